"""`convert` on the command line: in, out, and the layer that differs is named."""

import numpy as np
import pytest
import safetensors.numpy

from tests.interop.language_folders import write_folder
from tpo_jax import convert

pytestmark = pytest.mark.parity


def _run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return convert.main()


def test_the_first_layer_that_differs_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write_folder(tmp_path / "source", "qwen2")
    model, exported = tmp_path / "model", tmp_path / "exported"
    assert _run(monkeypatch, "import", f"--source={tmp_path / 'source'}", f"--out={model}") == 0
    assert _run(monkeypatch, "export", f"--model={model}", f"--out={exported}") == 0
    check = ("check", f"--model={model}", f"--exported={exported}")
    assert _run(monkeypatch, *check) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "layer " in line] == ["0", "1", "2"]

    file = exported / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.flip(
        tensors["model.layers.1.mlp.up_proj.weight"]
    ).copy()
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert _run(monkeypatch, *check) == 1
    assert "first difference above 0.0002: language/layer 1" in capsys.readouterr().err


def test_errors_are_one_line_and_no_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert _run(monkeypatch, "import", f"--source={tmp_path}", f"--out={tmp_path / 'out'}") == 2
    assert "error: " in capsys.readouterr().err
