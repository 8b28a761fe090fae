"""`convert check` of imported families: parts in PyTorch, and the layer that differs is named."""

import numpy as np
import pytest
import safetensors.numpy

from tests.interop.families.configs import (
    LLAVA_ONEVISION,
    LONGVA,
    VIDEO_LLAVA,
    VIDEO_LLAVA_ORIGINAL,
)
from tests.interop.families.folders import write_folder
from tpo_jax import convert

pytestmark = pytest.mark.parity


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
    write_folder(source, VIDEO_LLAVA_ORIGINAL)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    assert run(monkeypatch, "check", f"--model={model}", f"--exported={source}") == 2
    assert "no tower like that of video_llava_original" in capsys.readouterr().err
