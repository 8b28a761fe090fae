"""CG-DETR of VideoChat-TPO: in where it is asked for, out bit for bit, and the same function."""

import copy
import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.interop.families.configs import VIDEOCHAT
from tests.interop.families.published_folder import same_tensors
from tests.interop.families.videochat_release import (
    ROWS,
    published_keys,
    random_leaves,
    write_release,
)
from tests.models.heads import cg_detr_published as reference
from tpo_jax.interop import folder
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.cg_detr_rows import cg_detr_rows
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.families.registry import family_of, from_leaves
from tpo_jax.interop.families.tpo_heads import CLIP_FEATURES, TEXT_FEATURES
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.config import ClipFeaturesConfig, TextFeaturesConfig
from tpo_jax.models.heads import tokens_of
from tpo_jax.models.video_language import FunctionalModel

CHOSEN = ["region_mlp", "cg_detr"]
DATA = copy.deepcopy(VIDEOCHAT)
DATA["llm_config"]["vocab_size"] = ROWS
WIDTH = DATA["llm_config"]["hidden_size"]
DATA["cg_config"] = {
    "width": 16, "heads": 2, "layers": 1, "clip_features": {"width": 6},
    "text_features": {"width": WIDTH, "tokens": 5, "encoder": "of the test"},
}  # fmt: skip
UNUSED = ("cg_model.txt_position_embed.", "cg_model.txt_proj_linear.")


def test_every_published_name_is_used_but_those_that_the_release_does_not_use():
    names = {key for key in published_keys() if key.startswith("cg_model.")}
    ours = [row.theirs for row in cg_detr_rows(2, "heads/cg_detr/", "cg_model.")]
    assert len(ours) == len(set(ours)) == 278
    assert names - set(ours) == {key for key in names if key.startswith(UNUSED)}
    assert set(ours) <= names and len(names) - len(ours) == 7


def config_of(data=DATA):
    family = family_of(data)
    keys = {"loc_decoder.0.weight", "cg_model.query_embed.weight"}
    config = family.with_heads(family.model_config(data, {}), keys, CHOSEN, data)
    names = tokens_of(config.heads)
    return dataclasses.replace(config, tokens={t: 300 + i for i, t in enumerate(names)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny checkpoint with all that this head's part of the published one has."""
    config = config_of()
    tensors = from_leaves(family_of(DATA), config, random_leaves(config), {}, ())
    for i, key in enumerate(sorted(key for key in published_keys() if key.startswith(UNUSED))):
        tensors[key] = np.full(3, i, ml_dtypes.bfloat16)
    tensors |= {"cg_criterion.empty_weight": np.ones(2, np.float32),
                "track_token": np.ones((1, 1, WIDTH), np.float32)}  # fmt: skip
    path = tmp_path_factory.mktemp("published")
    write_release(path, DATA, tensors)
    return path


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "model"
    return path, import_family(source, path, {"heads": CHOSEN})


def test_in_and_out_again(source, model, tmp_path):
    path, lines = model
    assert "heads: region_mlp, cg_detr" in lines
    carried = {line.split(": ")[1] for line in lines if "carried" in line}
    assert all(key.startswith((*UNUSED, "cg_criterion.", "track_token")) for key in carried)
    config = folder.load_config(path)
    assert config.clip_features == ClipFeaturesConfig(6, 1.0, "InternVideo2-CLIP-1B")
    assert config.text_features == TextFeaturesConfig(WIDTH, 5, "of the test")
    assert (config.head.width, config.head.heads, config.head.layers) == (16, 2, 1)
    export_family(path, tmp_path / "out", source)
    same_tensors(source, tmp_path / "out")


def test_it_computes_what_the_published_tensors_say(source, model):
    """Of the checkpoint's bfloat16 numbers, in float32, against float64 on the file's own."""
    config, params, codec = folder.load_model(model[0])
    w = {name.removeprefix("cg_model."): np.asarray(tensor).astype(np.float64)
         for name, tensor in read_tensors(source).items() if name.startswith("cg_model.")}
    net, rng = FunctionalModel(config), np.random.default_rng(1)
    temp = net.bind(params).embed_tokens(np.array([codec.special_ids["<temp>"]]))
    np.testing.assert_array_equal(temp, np.asarray(read_tensors(source)["temporal_token"])[0])
    words, prompt, clips = (rng.normal(size=shape).astype(np.float32)
                            for shape in ((5, WIDTH), (WIDTH,), (4, 6)))  # fmt: skip

    @jax.jit
    def answer(params):
        frames = np.zeros((1, 4, *[config.vision.image_size] * 2, 3), np.uint8)
        return net.bind(params).run_head(
            "cg_detr", prompt[None, None], None, frames, np.ones((1, 4), bool),
            prompt=words[None, None], prompt_valid=np.ones((1, 1, 5), bool),
            clip_features=clips[None],
        )  # fmt: skip

    got = answer(params)
    expected = reference.run(w, *(np.float64(x) for x in (words, prompt, clips)), heads=2)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name][0, 0], value, rtol=2e-4, atol=2e-4, err_msg=name)


def test_by_itself_it_stays_carried(source, tmp_path):
    """It reads what the checkpoint does not hold."""
    lines = import_family(source, tmp_path / "model")
    assert "heads: region_mlp" in lines
    assert "  carried, not used: cg_model.query_embed.weight" in lines
    assert folder.load_config(tmp_path / "model").clip_features is None


def test_the_published_sizes():
    """13,953,835 - what nothing reads, over features of 768 numbers and states of 4096."""
    assert CLIP_FEATURES.width + 2 == 770 and CLIP_FEATURES.clip_seconds == 1.0
    assert TEXT_FEATURES.width == 4096 and TEXT_FEATURES.tokens == 80
    head = family_of(VIDEOCHAT).model_config(VIDEOCHAT, {}).head
    assert (head.width, head.heads, head.layers) == (256, 8, 2)


@pytest.mark.parametrize("change, reason", [
    ({"clip_features": None}, "reads clip_features, and the model's config has clip_features: nul"),
    ({"text_features": None}, "reads text_features, and the model's config has text_features: nul"),
    ({"head": 32}, "head is HeadConfig.width=32"),
])  # fmt: skip
def test_a_head_that_reads_something_else_does_not_go_out(source, model, tmp_path, change, reason):
    config, leaves = folder.load_config(model[0]), folder.open_leaves(model[0])
    codec = folder.load_codec(model[0])
    if "head" in change:
        change = {"head": dataclasses.replace(config.head, width=change["head"])}
    changed = dataclasses.replace(config, **change).to_dict()
    folder.write_model(tmp_path / "model", changed, leaves, codec,
                       preprocessor=folder.preprocessor(config))  # fmt: skip
    with pytest.raises(FamilyError, match=reason):
        export_family(tmp_path / "model", tmp_path / "out", source)


def test_features_of_another_width_do_not_go_out(source, model, tmp_path):
    config, leaves = folder.load_config(model[0]), dict(folder.open_leaves(model[0]))
    wide = dataclasses.replace(config, clip_features=ClipFeaturesConfig(7, 1.0, "another"))
    for part, shape in (("norm1/scale", (9,)), ("norm1/bias", (9,)), ("linear1/kernel", (9, 16))):
        leaves[f"heads/cg_detr/clip_proj/{part}"] = lazy(np.zeros(shape, ml_dtypes.bfloat16))
    folder.write_model(tmp_path / "model", wide.to_dict(), leaves, folder.load_codec(model[0]),
                       preprocessor=folder.preprocessor(config))  # fmt: skip
    with pytest.raises(FamilyError, match=r"input_vid_proj.0.*would be .*9\], but in .*8\]"):
        export_family(tmp_path / "model", tmp_path / "out", source)


@pytest.mark.parametrize("given, message", [
    ({"depth": 3}, r"cg_config: \['depth'\] is no field of head; use \['width'.*'text_features'\]"),
    ({"clip_features": {"seconds": 2}}, r"\['seconds'\] is no field of clip_features"),
])  # fmt: skip
def test_an_option_that_does_not_exist_is_named(source, tmp_path, given, message):
    with pytest.raises(FamilyError, match=message):
        import_family(source, tmp_path / "model", {"heads": CHOSEN, "cg_config": given})
