"""Heads on a model of a family: out beside the published files, SAM 2 in its own, and in again."""

import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_ONEVISION
from tests.interop.families.published_folder import (
    same_tensors,
    sized,
    train_heads,
    write_published,
)
from tests.interop.families.sam2_folder import write_sam2
from tpo_jax import convert
from tpo_jax.interop import folder
from tpo_jax.interop.export import largest_difference
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.config import LoraConfig

HEADS = ("region", "sam2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """source: LLaVA-OneVision; sam2: SAM 2; base: both in one model folder, as `import --into`
    leaves it; model: that with heads and task tokens."""
    path = tmp_path_factory.mktemp("world")
    (path / "source").mkdir()
    write_published(path / "source", sized(LLAVA_ONEVISION))
    write_sam2(path / "sam2")
    names = ("source", "sam2", "bare", "base", "model")
    world = types.SimpleNamespace(**{name: path / name for name in names})
    assert convert.main(["import", f"--source={world.source}", f"--out={world.bare}"]) == 0
    into = [f"--source={world.sam2}", f"--into={world.bare}", f"--out={world.base}"]
    assert convert.main(["import", *into]) == 0
    train_heads(world.base, world.model, HEADS)
    return world


def export(model, out, *likes, more=()):
    likes = [f"--like={like}" for like in likes]
    return convert.main(["export", f"--model={model}", f"--out={out}", *likes, *more])


def test_out_and_in_again(world, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert export(world.model, out, world.sam2, world.source) == 0
    assert capsys.readouterr().out.endswith(
        "out: chat_template.jinja, config.json, generation_config.json, model.safetensors, sam2, "
        "tokenizer.json, tpo.safetensors, tpo_config.json\n"
    )
    same_tensors(world.source, out)
    same_tensors(world.sam2, out / "sam2")
    for file in ("source/config.json", "sam2/config.json", "sam2/preprocessor_config.json"):
        published = (world.source.parent / file).read_bytes()
        assert (out / file.removeprefix("source/")).read_bytes() == published
    about = json.loads((out / "tpo_config.json").read_text())
    assert about["format_version"] == 1 and about["model"]["heads"] == ["region", "sam2"]
    assert about["model"]["sam2"]["widths"] == [8, 16, 32, 64]
    assert not {"vision", "connector", "language"} & about["model"].keys()

    assert convert.main(["import", f"--source={out}", f"--out={back}"]) == 0
    assert "heads: region, sam2" in capsys.readouterr().out
    assert folder.load_config(back) == folder.load_config(world.model)
    codecs = [folder.load_codec(path) for path in (world.model, back)]
    assert codecs[0].tokenizer.to_str() == codecs[1].tokenizer.to_str()
    assert folder.load_codec(world.bare).vocab_size <= codecs[1].task_tokens["<box_begin>"] < 320
    for other in (back, out):  # training starts from either
        leaves = folder.open_leaves(other)
        for name, leaf in folder.open_leaves(world.model).items():
            assert np.asarray(leaf).tobytes() == np.asarray(leaves.pop(name)).tobytes(), name
        assert not leaves


def test_a_network_that_no_head_reads_yet(world, tmp_path):
    """As `import --into` leaves it."""
    out, back = tmp_path / "out", tmp_path / "back"
    assert export(world.base, out, world.source) == 0
    same_tensors(world.source, out)
    assert (out / "tokenizer.json").read_bytes() == (world.source / "tokenizer.json").read_bytes()
    assert convert.main(["import", f"--source={out}", f"--out={back}"]) == 0
    assert largest_difference(world.base, back) == 0.0
    assert folder.load_config(back) == folder.load_config(world.base)
    # What went out serves as a layout, and its own parts are not taken for those of the model.
    assert export(world.bare, tmp_path / "bare", out) == 0
    same_tensors(world.source, tmp_path / "bare")
    assert not [file.name for file in (tmp_path / "bare").iterdir() if file.name[:3] == "tpo"]


def test_adapters_merged_or_apart(world, tmp_path):
    config, leaves = folder.load_config(world.model), folder.open_leaves(world.model)
    kernel, rng = "language/layers/self_attn/q_proj/kernel", np.random.default_rng(2)
    config = dataclasses.replace(config, lora=LoraConfig(f"^{kernel}$", 2, 4.0))
    L, D, H = leaves[kernel].shape
    for name, shape in (("lora_a", (L, D, 2)), ("lora_b", (L, 2, H))):
        leaf = lazy(rng.normal(size=shape).astype(np.float32))
        leaves[kernel.replace("kernel", name)] = leaf
    folder.write_model(tmp_path / "model", config.to_dict(), leaves, folder.load_codec(world.model))
    likes = world.source, world.sam2
    assert export(tmp_path / "model", tmp_path / "merged", *likes) == 0
    assert export(tmp_path / "model", tmp_path / "apart", *likes, more=["--keep_adapters"]) == 0
    same_tensors(world.source, tmp_path / "apart")
    apart = [f"--source={tmp_path / 'apart'}", f"--adapter={tmp_path / 'apart/adapter'}"]
    for name, source in (("a", apart), ("b", [f"--source={tmp_path / 'merged'}"])):
        assert convert.main(["import", *source, f"--out={tmp_path / name}"]) == 0
    assert folder.load_config(tmp_path / "a") == folder.load_config(tmp_path / "b")
    assert folder.load_config(tmp_path / "a").heads == HEADS
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0.0
    assert largest_difference(tmp_path / "a", world.model) > 0.1


@pytest.mark.parametrize("model, likes, message", [
    ("model", ["source"], r"\['region', 'sam2'\]: the layout of .*/source has no place for the netw"
     r"ork of sam2; give the folder of SAM 2 that it came from with a second --like"),
    ("base", ["source", "sam2"], r"heads: \[\], without sam2, so nothing goes out as .*/sam2; lea"),
    ("model", ["sam2"], "vision.kind='siglip' .* came from with a --like of its own"),
    ("model", ["source", "other"], r"sam2 is Sam2Config\(image_size=32.*image_size=64"),
    ("model", ["sam2", "other"], "--like: .*/sam2, .*/other: expected at most one folder of SAM 2"),
    ("model", ["source", "bare"], "expected at most one folder of a published model"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(world, tmp_path, capsys, model, likes, message):
    other = tmp_path / "other"  # of another size
    shutil.copytree(world.sam2, other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"image_size": 32', '"image_size": 64'))
    folders = [other if like == "other" else world.source.parent / like for like in likes]
    assert export(getattr(world, model), tmp_path / "out", *folders) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_whole_is_refused(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(world.model, out, world.source, world.sam2) == 0
    capsys.readouterr()
    command = ["import", f"--source={out}", f"--out={tmp_path / 'back'}"]
    assert convert.main([*command, "--set", "heads=region"]) == 2
    assert re.search("heads: .'region'.: .*tpo_config.json says which", capsys.readouterr().err)
    for name, message in (
        ("sam2/config.json", "sam2/config.json: missing; give the folder of SAM 2"),
        ("tpo.safetensors", "out/tpo.safetensors: missing; copy"),
        ("config.json", "tpo_config.json: lay beside config.json of a multimodal family, which is"),
    ):
        (out / name).rename(tmp_path / "away")
        assert convert.main(command) == 2
        assert message in capsys.readouterr().err
        (tmp_path / "away").rename(out / name)
    assert convert.main(command) == 0
