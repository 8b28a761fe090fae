"""Tensors that are not those of config.json are refused before anything is written."""

import re

import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_VIDEO, VIDEO_LLAVA_ORIGINAL, VIDEOCHAT
from tests.interop.families.published_folder import sized, write_published
from tests.interop.language_folders import write_folder
from tpo_jax import convert
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.tensors import lazy, write_file

TOWER = "model.vision_tower.vision_tower.vision_model.encoder.layers"


def without(pattern):
    """A change of tensors: those whose name matches are gone."""
    return lambda tensors: {k: x for k, x in tensors.items() if not re.match(pattern, k)}


def with_copy(old, new):
    """A change of tensors: those that have `old` in their name are there again, with `new`."""
    return lambda tensors: tensors | {
        k.replace(old, new): x for k, x in tensors.items() if old in k
    }


def longer(pattern, axis):
    """A change of tensors: one number more along the axis of those whose name matches."""
    return lambda tensors: {
        k: np.concatenate([x, np.take(x, [0], axis)], axis) if re.match(pattern, k) else x
        for k, x in tensors.items()
    }


# config.json, what is changed, and what the message says of it.
CASES = {
    "one of two decoder layers": (
        LLAVA_VIDEO, without(r"model\.layers\.1\."),
        r"12 tensors .*: model\.layers\.1\.input_layernorm\.weight is missing, expected \[32\]; ",
    ),
    "four of three layers of the tower": (
        LLAVA_VIDEO, with_copy(f"{TOWER}.2.", f"{TOWER}.3."),
        r"16 tensors .*: model\.vision.*layers\.3\.layer_norm1\.bias is \[24\], expected none; ",
    ),
    "a kernel, as the file has it": (
        LLAVA_VIDEO, longer(r"model\.layers\.\d\.mlp\.down_proj", 1),
        r"2 tensors .*layers\.0\.mlp\.down_proj\.weight is \[32, 49\], expected \[32, 48\]; model",
    ),
    "a norm": (
        LLAVA_VIDEO, longer(r"model\.norm\.weight", 0),
        r"1 tensors .*: model\.norm\.weight is \[33\], expected \[32\]; ",
    ),
    "a projector": (
        LLAVA_VIDEO, longer(r"model\.mm_projector\.0", 0),
        r"2 tens.*0\.bias is \[33\], expected \[32\]; .*0\.weight is \[33, 24\], expected \[32, ",
    ),
    "frames of a tower": (
        VIDEO_LLAVA_ORIGINAL, longer(r".*temporal_embedding", 1),
        r"3 tensors .*layers\.0\.temporal_embedding is \[1, 9, 24\], expected \[1, 8, 24\]; ",
    ),
    "an adapter of the checkpoint": (
        VIDEOCHAT, longer(r".*layers\.\d\.self_attn\.q_proj\.lora_A", 0),
        r"2 tensors .*0\.self_attn\.q_proj\.lora_A\.default\.weight is \[3, 32\], expected \[2, 32",
    ),
}  # fmt: skip


def refusal(source, tensors, tmp_path, capsys):
    """What the import of a folder says that has these tensors; nothing is written."""
    for file in source.glob("model*"):
        file.unlink()
    write_file(source / "model.safetensors", {k: lazy(x) for k, x in tensors.items()},
               {"format": "pt"})  # fmt: skip
    assert convert.main(["import", f"--source={source}", f"--out={tmp_path / 'model'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    return capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named_and_nothing_is_written(case, tmp_path, capsys):
    data, change, message = CASES[case]
    source = tmp_path / "source"
    source.mkdir()
    write_published(source, sized(data))
    tensors = change({name: np.asarray(x) for name, x in read_tensors(source).items()})
    printed = refusal(source, tensors, tmp_path, capsys)
    assert re.search(message, printed), printed
    assert "the files are of different models, or not all are there; copy them again" in printed


@pytest.mark.parametrize("change, message", [
    (without(r"model\.layers\.2\."), r"layers\.2\.input_.*\.weight is missing, expected \[48"),
    (with_copy(".2.", ".3."), r"layers\.3\.input_layernorm\.weight is \[48\], expected none"),
    (longer(r".*down_proj", 1), r"0\.mlp\.down_proj\.weight is \[48, 41\], expected \[48, 40\]"),
    (longer(r".*\.k_proj\.bias", 0), r"0\.self_attn\.k_proj\.bias is \[25\], expected \[24\]"),
    (longer(r"model\.norm", 0), r"model\.norm\.weight is \[49\], expected \[48\]"),
])  # fmt: skip
def test_a_language_model_that_does_not_fit(change, message, tmp_path, capsys):
    source = tmp_path / "source"
    tensors = change(write_folder(source, "qwen2"))
    assert re.search(message, refusal(source, tensors, tmp_path, capsys))
