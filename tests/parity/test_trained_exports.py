"""Exports of trained models, as `transformers` loads them by itself: both ends of a tied table, and
the dtype."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.interop.families.configs import LLAVA_ONEVISION_TIED
from tests.interop.families.folders import VOCABULARY, forward, load, prompt, write_folder
from tests.parity.test_whole_families import IDS, inputs_of, load_whole
from tests.parity.towers import difference
from tpo_jax import convert
from tpo_jax.interop import folder

pytestmark = pytest.mark.parity
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def change_head(path, change):
    """The output table of a folder, after `change` of what is there, or of the table of tokens."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tensors[HEAD] = change(tensors.get(HEAD, tensors[TABLE]))
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """source: a tied LLaVA-OneVision whose files hold both ends; model: it, its table trained."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tied")
    write_folder(path / "source", LLAVA_ONEVISION_TIED | IDS | {"torch_dtype": "float32"})
    change_head(path / "source", np.copy)
    assert convert.main(["import", f"--source={path / 'source'}", f"--out={path / 'base'}"]) == 0
    config, params, codec = folder.load_model(path / "base")
    params["language"]["embed"]["table"][:VOCABULARY] *= np.float32(0.5)
    folder.save_model(path / "model", config, params, codec)
    return path


def export(world, out, *more):
    command = ["export", f"--model={world / 'model'}", f"--out={out}"]
    assert convert.main([*command, f"--like={world / 'source'}", *more]) == 0
    return out


def test_a_trained_table_is_at_both_ends(world, tmp_path):
    import torch

    theirs = load_whole(export(world, tmp_path / "out"))
    assert HEAD in safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    model, params, _ = load(world / "model")
    batch, ids = prompt(model.config)
    _, logits = jax.jit(lambda p, b: forward(model, p, b, False))(params, batch)
    vision = model.config.vision
    pixels = (batch["frames"][0] / 255 - np.array(vision.mean)) / np.array(vision.std)
    with torch.no_grad():
        expected = theirs(**inputs_of(pixels, ids)).logits[0]
    assert difference(logits, expected) < 2e-4 < 0.1 < float(np.std(logits))


def test_check_sees_another_output_table(world, tmp_path, capsys):
    out = export(world, tmp_path / "out")
    check = ["check", f"--model={world / 'model'}", f"--exported={out}"]
    assert convert.main(check) == 0
    shutil.copytree(out, tmp_path / "stale")
    change_head(tmp_path / "stale", lambda head: 2 * head)  # as before the training
    capsys.readouterr()
    assert convert.main([*check[:2], f"--exported={tmp_path / 'stale'}"]) == 1
    assert "first difference above 0.0002: language/logits" in capsys.readouterr().err


@pytest.mark.parametrize("chosen, name", [
    ((), "float32"), (("--dtype=bfloat16",), "bfloat16"), (("--dtype=float16",), "float16"),
])  # fmt: skip
def test_transformers_loads_in_the_dtype_that_was_written(world, tmp_path, chosen, name):
    from transformers import AutoModelForImageTextToText

    out = export(world, tmp_path / "out", *chosen)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == name
    theirs = AutoModelForImageTextToText.from_pretrained(out)
    state = theirs.state_dict()
    assert {str(x.dtype) for x in state.values() if x.is_floating_point()} == {f"torch.{name}"}
    written = safetensors.numpy.load_file(out / "model.safetensors")
    kernel = "layers.1.mlp.up_proj.weight"
    found = state[f"model.language_model.{kernel}"].float().numpy()
    wanted = written[f"language_model.model.{kernel}"].astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
