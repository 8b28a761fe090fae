"""The CG-DETR head in PyTorch computes the same."""

import dataclasses

import jax
import numpy as np
import pytest

from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop import export
from tpo_jax.interop.folder import save_model
from tpo_jax.models import presets
from tpo_jax.models.config import ClipFeaturesConfig, TextFeaturesConfig
from tpo_jax.models.video_language import FunctionalModel

GIVEN = ClipFeaturesConfig(24, 2.0, "by hand")


@pytest.mark.parity
@pytest.mark.parametrize("given", [None, pytest.param(GIVEN, marks=pytest.mark.long)])
def test_pytorch_computes_the_same(tmp_path, given):
    """On frames and the model's states of the question, and on given features of both."""
    pytest.importorskip("torch")
    from tpo_jax.interop import check

    tokenizer = train_tokenizer(["what happens here? nothing", "the red circle moves left"], 300)
    add_task_tokens(tokenizer, ("cg_detr",))
    codec = TextCodec(tokenizer)
    config = presets.preset("micro", ("cg_detr",), codec.task_tokens)
    texts = given and TextFeaturesConfig(config.language.width, 7, "by hand")
    config = dataclasses.replace(config, clip_features=given, text_features=texts)
    params = jax.jit(FunctionalModel(config).init)(jax.random.key(0))
    # Perturbed, so that no norm or bias is the identity.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (np.asarray(x) + 0.05 * rng.normal(size=x.shape)).astype(np.float32), params
    )
    save_model(tmp_path / "model", config, params, codec)
    export.export_model(tmp_path / "model", tmp_path / "exported")
    differences = check.compare(tmp_path / "model", tmp_path / "exported")
    heads = {part for part in differences if part.startswith("heads/cg_detr/")}
    assert heads == {f"heads/cg_detr/{k}" for k in ("logits", "spans", "saliency", "relevance")}
    assert max(differences.values()) < 5e-4, differences
