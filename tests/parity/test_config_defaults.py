"""What a config.json leaves out, against the configuration classes of `transformers`."""

import pytest

from tpo_jax.interop.families.base import tower_config
from tpo_jax.interop.huggingface import language_config

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_language_models(name):
    whole = getattr(pytest.importorskip("transformers"), f"{name}Config")().to_dict()
    assert language_config({"model_type": name.lower()}) == language_config(whole)
    longer = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}  # of max_position_embeddings
    theirs = {k: v for k, v in whole.items() if k != "rope_parameters"} | longer
    assert language_config({"model_type": name.lower()} | longer) == language_config(theirs)


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2"])
def test_vision_towers(name):
    whole = getattr(pytest.importorskip("transformers"), f"{name}VisionConfig")().to_dict()
    short = {"model_type": f"{name.lower()}_vision_model"}
    assert tower_config(short, layer=-2) == tower_config(whole, layer=-2)
