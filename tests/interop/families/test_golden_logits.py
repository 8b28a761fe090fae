"""Whole multimodal models against logits that `transformers` gave, without torch."""

import jax
import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_ONEVISION_TIED, VIDEO_LLAVA
from tests.interop.families.folders import (
    GOLDEN,
    GOLDEN_EVERY,
    forward,
    load,
    prompt,
    write_folder,
)
from tpo_jax.interop.families.folder import import_family


@pytest.mark.parametrize("name, data", [
    ("llava_onevision_tied", LLAVA_ONEVISION_TIED),
    ("video_llava", VIDEO_LLAVA),
])  # fmt: skip
def test_logits_of_an_imported_family(name, data, tmp_path):
    """`python -m tests.parity.test_whole_families` writes the golden numbers."""
    write_folder(tmp_path / "source", data)
    import_family(tmp_path / "source", tmp_path / "model")
    model, params, _ = load(tmp_path / "model")
    batch, _ = prompt(model.config)
    _, logits = jax.jit(lambda *args: forward(model, *args, layers=False))(params, batch)
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(logits[:, ::GOLDEN_EVERY], golden[name], atol=2e-4)
