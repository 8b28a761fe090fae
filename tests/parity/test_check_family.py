"""`convert check` of imported families: parts in PyTorch, and the layer that differs is named."""

import json

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import AddedToken

from tests.interop.families.configs import (
    LLAVA_ONEVISION,
    LONGVA,
    VIDEO_LLAVA,
    VIDEO_LLAVA_ORIGINAL,
)
from tpo_jax import convert
from tpo_jax.data.text import train_tokenizer
from tpo_jax.interop.families.registry import family_of, from_leaves
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

pytestmark = pytest.mark.parity
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>")


def write_folder(path, data):
    """A published folder with random float32 weights."""
    text = "text_config" if "text_config" in data else ""
    data = data | ({"text_config": data[text] | {"vocab_size": 320}} if text else
                   {"vocab_size": 320})  # fmt: skip
    family = family_of(data)
    config = family.model_config(data, {})
    rng = np.random.default_rng(0)
    leaves = {}
    for name, leaf in flatten(FunctionalModel(config).abstract()).items():
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        leaves[name] = (scale * rng.normal(size=leaf.shape)).astype(np.float32)
        if name.endswith("scale"):
            leaves[name] += 1
    leaves["language/embed/table"][320:] = 0
    leaves["language/lm_head/kernel"][:, 320:] = 0
    tensors = {k: np.ascontiguousarray(v) for k, v in
               from_leaves(family, config, leaves, {}, ()).items()}  # fmt: skip
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer = train_tokenizer(["You are a helpful assistant. USER: ASSISTANT:"], 300)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "config.json").write_text(json.dumps(data))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return convert.main()


@pytest.mark.parametrize(
    ("data", "changed", "named"),
    [
        (LLAVA_ONEVISION, "vision_tower.*layers.1.mlp.fc1.weight", "vision/vision_tower/layer 1"),
        (LONGVA, "model.mm_projector.2.weight", "connector/linear_2"),
        (VIDEO_LLAVA, "*layers.1.self_attn.q_proj.weight", "vision/image_tower/layer 1"),
    ],
)  # fmt: skip
def test_the_first_layer_that_differs_is_named(data, changed, named, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    source, model = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    write_folder(source, data)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    check = ("check", f"--model={model}", f"--exported={source}")
    assert run(monkeypatch, *check) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    parts = [line.rsplit(maxsplit=1)[0].strip() for line in lines]
    assert {"connector/linear_1", "language/layer 1", "language/logits", named} <= set(parts)

    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    key = min(key for key in tensors if all(part in key for part in changed.split("*")))
    tensors[key] = np.flip(tensors[key]).copy()
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert run(monkeypatch, *check) == 1
    assert f"first difference above 0.0002: {named}" in capsys.readouterr().err


def test_a_tower_that_transformers_lacks_is_refused_by_name(tmp_path, monkeypatch, capsys):
    source, model = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    write_folder(source, VIDEO_LLAVA_ORIGINAL)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    assert run(monkeypatch, "check", f"--model={model}", f"--exported={source}") == 2
    assert "no tower like that of video_llava_original" in capsys.readouterr().err
