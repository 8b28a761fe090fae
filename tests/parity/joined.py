"""A tiny SigLIP 2 and a tiny Qwen3 as one model, and what it is exported as."""

import json

import numpy as np

from tests.interop import language_folders
from tests.parity.towers import randomise
from tpo_jax.interop import folder, siglip
from tpo_jax.interop.export import import_model
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 36}  # fmt: skip
# 5 x 5 patches: an odd row and column that pooling leaves out.
VISION = SIZES | {"patch_size": 8, "num_patches": 25}


def write_qwen3(path):
    """Qwen3 with positions as published: the tiny folder's grow with the length of a row."""
    language_folders.write_folder(path, "qwen3")
    about = json.loads((path / "config.json").read_text())
    del about["rope_scaling"]
    (path / "config.json").write_text(json.dumps(about))


def write_joined(path):
    """`model`, a whole model with a random connector, and `exported`, its export, in a folder."""
    from transformers import Siglip2Config, Siglip2Model

    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    text = SIZES | ends | {"vocab_size": 40, "projection_size": 24}
    whole = randomise(Siglip2Model(Siglip2Config(vision_config=VISION, text_config=text)))
    whole.save_pretrained(path / "siglip2")
    write_qwen3(path / "published")
    import_model(path / "published", path / "qwen3")
    siglip.add_to_language(path / "siglip2", path / "qwen3", path / "parts")
    config, codec = folder.load_config(path / "parts"), folder.load_codec(path / "parts")
    rng = np.random.default_rng(0)
    connector = {
        name: lazy(rng.normal(size=leaf.shape).astype(np.float32) * leaf.shape[0] ** -0.5)
        for name, leaf in flatten(FunctionalModel(config).abstract()).items()
        if name.startswith("connector/")
    }
    folder.write_model(
        path / "model", config.to_dict(), dict(folder.open_leaves(path / "parts")) | connector,
        codec, preprocessor=folder.preprocessor(config),
    )  # fmt: skip
    siglip.export_parts(path / "model", path / "exported", path / "siglip2")
