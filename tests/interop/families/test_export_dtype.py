"""The dtype of exported weights, and config.json that names it."""

import json

import ml_dtypes
import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_VIDEO
from tests.interop.families.published_folder import sized, write_published
from tests.interop.language_folders import write_folder
from tpo_jax import convert
from tpo_jax.interop import folder
from tpo_jax.interop.export import largest_difference
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.tensors import lazy

TRAINED = "model.norm.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
PARTS = {"vision_config": LLAVA_VIDEO["vision_config"] | {"torch_dtype": "bfloat16"}}


def arrays(path):
    return {name: np.asarray(x) for name, x in read_tensors(path).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A published folder in bfloat16 with a buffer, and that model after training of one leaf: all
    of its parameters are float32."""
    path = tmp_path_factory.mktemp("dtype")
    (path / "source").mkdir()
    data = sized(LLAVA_VIDEO) | PARTS | {"torch_dtype": "bfloat16"}
    write_published(path / "source", data, **{BUFFER: np.ones(4, np.float32) / 3})
    assert convert.main(["import", f"--source={path / 'source'}", f"--out={path / 'base'}"]) == 0
    config, codec = folder.load_config(path / "base"), folder.load_codec(path / "base")
    leaves = {k: np.asarray(x, np.float32) for k, x in folder.open_leaves(path / "base").items()}
    leaves["language/final_norm/scale"] += np.float32(1 / 3)
    lazily = {name: lazy(leaf) for name, leaf in leaves.items()}
    folder.write_model(path / "model", config.to_dict(), lazily, codec)
    return path


def export(world, out, *more):
    return convert.main(["export", f"--model={world / 'model'}", f"--out={out}", *more])


@pytest.mark.parametrize("dtype", ["bfloat16", "checkpoint"])
def test_what_was_not_trained_goes_out_bit_for_bit(world, tmp_path, dtype):
    out, like = tmp_path / "out", f"--like={world / 'source'}"
    assert export(world, out, like, f"--dtype={dtype}") == 0
    theirs, ours = arrays(world / "source"), arrays(out)
    assert theirs.keys() == ours.keys()
    changed = {k for k in theirs if theirs[k].tobytes() != ours[k].tobytes()}
    assert changed == {TRAINED} and ours[TRAINED].dtype == ml_dtypes.bfloat16
    trained = np.asarray(folder.open_leaves(world / "model")["language/final_norm/scale"])
    np.testing.assert_array_equal(ours[TRAINED], trained.astype(ml_dtypes.bfloat16))
    assert (out / "config.json").read_bytes() == (world / "source/config.json").read_bytes()
    assert convert.main(["import", f"--source={out}", f"--out={tmp_path / 'back'}"]) == 0
    assert 0 < largest_difference(world / "model", tmp_path / "back") < 0.02


@pytest.mark.parametrize("chosen, dtype", [
    ((), np.float32), (("--dtype=float32",), np.float32), (("--dtype=float16",), np.float16),
])  # fmt: skip
def test_config_json_names_the_dtype_that_is_written(world, tmp_path, chosen, dtype):
    out = tmp_path / "out"
    assert export(world, out, f"--like={world / 'source'}", *chosen) == 0
    ours = arrays(out)
    assert {x.dtype for k, x in ours.items() if k != BUFFER} == {np.dtype(dtype)}
    np.testing.assert_array_equal(ours[BUFFER], np.ones(4, np.float32) / 3)  # carried
    about, came = (json.loads((p / "config.json").read_text()) for p in (out, world / "source"))
    name = np.dtype(dtype).name
    assert about["torch_dtype"] == about["vision_config"]["torch_dtype"] == name
    came["torch_dtype"] = came["vision_config"]["torch_dtype"] = name
    assert about == came
    if dtype == np.float32:  # as the model is
        assert convert.main(["import", f"--source={out}", f"--out={tmp_path / 'back'}"]) == 0
        assert largest_difference(world / "model", tmp_path / "back") == 0


def test_a_number_that_does_not_fit_is_named(world, tmp_path, capsys):
    config, params, codec = folder.load_model(world / "model")
    params["language"]["final_norm"]["scale"][3] = 7e4
    folder.save_model(tmp_path / "model", config, params, codec)
    command = ["export", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}",
               f"--like={world / 'source'}"]  # fmt: skip
    assert convert.main([*command, "--dtype=float16"]) == 2
    assert f"{TRAINED}: 70000 is beyond float16; export with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert.main([*command, "--dtype=bfloat16"]) == 0


def test_a_config_json_that_names_no_dtype_gets_one_where_it_is_another(tmp_path):
    source, model = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    write_published(source, sized(LLAVA_VIDEO))
    assert convert.main(["import", f"--source={source}", f"--out={model}"]) == 0
    same, other = ["export", f"--model={model}", f"--like={source}"], tmp_path / "other"
    assert convert.main([*same, f"--out={tmp_path / 'same'}"]) == 0
    published = (source / "config.json").read_bytes()
    assert (tmp_path / "same/config.json").read_bytes() == published
    assert convert.main([*same, f"--out={other}", "--dtype=float32"]) == 0
    wanted = json.loads(published) | {"torch_dtype": "float32"}
    assert json.loads((other / "config.json").read_text()) == wanted


def test_a_language_folder(tmp_path, capsys):
    source, model, out = (tmp_path / name for name in ("source", "model", "out"))
    published = write_folder(source, "llama", dtype=ml_dtypes.bfloat16)
    assert convert.main(["import", f"--source={source}", f"--out={model}"]) == 0
    export = ["export", f"--model={model}", f"--out={out}"]
    assert convert.main([*export, "--dtype=float32"]) == 0
    for name, tensor in arrays(out).items():
        np.testing.assert_array_equal(tensor, published[name].astype(np.float32))
        assert tensor.dtype == np.float32
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert convert.main([*export, "--dtype=checkpoint"]) == 2
    wanted = "--dtype=checkpoint: has no meaning for an export without --like of a published mod"
    printed = capsys.readouterr().err
    assert wanted in printed and "use one of float32, bfloat16, float16" in printed
