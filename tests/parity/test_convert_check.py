"""`convert` on the command line: in, out, and the layer that differs is named."""

import textwrap

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


def test_the_lines_that_are_printed_for_pickles_convert_them(tmp_path, monkeypatch, capsys):
    """Run as they are printed: they write what `import` takes."""
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    tensors = write_folder(source, "qwen2")
    for file in source.glob("model*"):
        file.unlink()
    pickled = [(name, torch.from_numpy(value)) for name, value in tensors.items()]
    # Two names of one tensor, as a model with one table for both ends saves them.
    shared = {"lm_head.weight": dict(pickled)["model.embed_tokens.weight"]}
    torch.save(dict(pickled[::2]) | shared, source / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(pickled[1::2]), source / "pytorch_model-00002-of-00002.bin")
    command = ("import", f"--source={source}", f"--out={tmp_path / 'model'}")
    assert _run(monkeypatch, *command) == 2
    lines = capsys.readouterr().err.partition("  import torch\n")
    exec(textwrap.dedent(lines[1] + lines[2]), {})
    assert _run(monkeypatch, *command) == 0
    assert "left out: lm_head.weight" in capsys.readouterr().out
    assert _run(monkeypatch, "export", f"--model={tmp_path / 'model'}", f"--out={tmp_path}/b") == 0
    back = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    assert all(np.array_equal(back[name], value) for name, value in tensors.items())
