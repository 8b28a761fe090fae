"""Config readers and mapping tables of the published families, without PyTorch."""

import copy
import functools
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from tests.interop.families.configs import (
    CONFIGS,
    LLAVA_ONEVISION,
    LLAVA_VIDEO,
    LONGVA,
    VIDEO_LLAVA,
    VIDEO_LLAVA_ORIGINAL,
    VIDEOCHAT,
)
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.llava_qwen import resolutions
from tpo_jax.interop.families.registry import family_of, from_leaves, to_leaves
from tpo_jax.interop.families.source import read_config
from tpo_jax.interop.mapping import MappingError
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

FAMILY = {
    "llava_onevision": "llava_onevision", "llava_onevision_tied": "llava_onevision",
    "llava_video": "llava_qwen", "longva": "llava_qwen",
    "video_llava": "video_llava", "video_llava_original": "video_llava_original",
    "videochat": "videochat",
}  # fmt: skip
SOURCES = {"llava_onevision": {"vision_tower.vision_model.x"},
           "llava_onevision_tied": {"vision_tower.vision_model.x"},
           "video_llava": {"image_tower.vision_model.x"}}  # fmt: skip


@functools.cache
def config_of(name):
    data = CONFIGS[name]
    return family_of(data).model_config(data, {})


@functools.cache
def leaves_of(name):
    """Random leaves in the shapes of the model; rows of the tables that no token uses are zero."""
    config, rng = config_of(name), np.random.default_rng(0)
    leaves = {}
    for path, leaf in flatten(FunctionalModel(config).abstract()).items():
        leaves[path] = rng.normal(size=leaf.shape).astype(ml_dtypes.bfloat16)
        used = config.language.num_tokens
        if path == "language/embed/table":
            leaves[path][used:] = 0
        if path in ("language/lm_head/kernel", "language/lm_head/lora_b"):
            leaves[path][:, used:] = 0
    return leaves


def exported(name, carried=None):
    family = family_of(CONFIGS[name])
    keys = SOURCES.get(name, set())
    return from_leaves(family, config_of(name), leaves_of(name), carried or {}, keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_out_and_in_again_is_bit_identical(name):
    family, tensors = family_of(CONFIGS[name]), exported(name)
    assert family.name == FAMILY[name]
    assert any("lm_head" in key for key in tensors) == (name != "llava_onevision_tied")
    leaves, carried = to_leaves(family, config_of(name), tensors)
    assert carried == {} and leaves.keys() == leaves_of(name).keys()
    for path, leaf in leaves_of(name).items():
        np.testing.assert_array_equal(leaves[path].view(np.uint16), leaf.view(np.uint16), path)
    again = from_leaves(family, config_of(name), leaves, carried, tensors.keys())
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_survives_a_file(name):
    config = config_of(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_names_of_a_tpo_checkpoint_are_those_of_its_index():
    """videochat_tpo_keys.txt: names in OpenGVLab/TPO's model.safetensors.index.json with numbers
    as N, without those of its temporal head and SAM 2."""
    lines = (pathlib.Path(__file__).parent / "videochat_tpo_keys.txt").read_text().split()
    published = {key for key in lines if not key.startswith(("cg_", "sam."))}
    ours = {re.sub(r"\.\d+\.", ".N.", key) for key in exported("videochat")}
    carried = [re.compile(pattern) for pattern in family_of(VIDEOCHAT).carried]
    assert ours <= published
    rest = {key.replace(".N.", ".0.") for key in published - ours}
    assert rest and all(any(p.fullmatch(key) for p in carried) for key in rest)


def test_what_is_carried_goes_back_out():
    extra = {"box_token": np.ones((1, 1, 32), np.float32),
             "sam.memory.weight": np.ones(3, np.float32)}  # fmt: skip
    family, tensors = family_of(VIDEOCHAT), exported("videochat", extra)
    _, carried = to_leaves(family, config_of("videochat"), tensors)
    assert carried.keys() == extra.keys()


def test_rates_of_the_qformer_are_told_as_not_applied():
    assert family_of(VIDEOCHAT).unapplied(VIDEOCHAT) == []
    data = copy.deepcopy(VIDEOCHAT)
    data["model_config"]["bridge"] |= {"qformer_hidden_dropout_prob": 0.1,
                                       "qformer_drop_path_rate": 0.2}  # fmt: skip
    assert family_of(data).unapplied(data) == [
        "model_config.bridge.qformer_hidden_dropout_prob=0.1",
        "model_config.bridge.qformer_drop_path_rate=0.2",
    ]


def test_an_unknown_tensor_is_refused():
    family = family_of(LLAVA_VIDEO)
    tensors = exported("llava_video") | {"model.vision_resampler.x": np.ones(2, np.float32)}
    with pytest.raises(MappingError, match="model.vision_resampler.x"):
        to_leaves(family, config_of("llava_video"), tensors)


@pytest.mark.parametrize("name, option", [
    ("llava_video", "mm_spatial_pool_mode"), ("llava_video", "mm_newline_position"),
    ("llava_video", "mm_spatial_pool_stride"), ("longva", "mm_patch_merge_type"),
    ("longva", "mm_vision_select_layer"), ("longva", "frames_upbound"),
    ("llava_video", "force_sample"), ("llava_video", "add_time_instruction"),
    ("video_llava_original", "image_aspect_ratio"), ("llava_onevision", "frames_upbound"),
    ("video_llava_original", "mm_image_tower"),
])  # fmt: skip
def test_an_option_that_config_json_does_not_say_is_named(name, option):
    data = copy.deepcopy(CONFIGS[name])
    del data[option]
    with pytest.raises(FamilyError, match=f"does not say {option}.*import with --set {option}=VAL"):
        family_of(data).model_config(data, {})
        family_of(data).sampling(data)


def test_an_option_that_this_program_does_not_have_is_named():
    with pytest.raises(FamilyError, match="mm_spatial_pool_mode='attention'"):
        family_of(LLAVA_VIDEO).model_config(LLAVA_VIDEO | {"mm_spatial_pool_mode": "attention"}, {})
    with pytest.raises(FamilyError, match="vision_feature_select_strategy='default'"):
        data = LLAVA_ONEVISION | {"vision_feature_select_strategy": "default"}
        family_of(data).model_config(data, {})


def test_an_aspect_ratio_of_images_that_this_program_does_not_have_is_refused():
    for data in (LLAVA_VIDEO, VIDEO_LLAVA_ORIGINAL):
        data = data | {"image_aspect_ratio": "highres"}
        with pytest.raises(FamilyError, match="'highres': this program has"):
            family_of(data).model_config(data, {})
    with pytest.raises(FamilyError, match="'pad': this program has"):
        family_of(LLAVA_VIDEO).model_config(LLAVA_VIDEO | {"image_aspect_ratio": "pad"}, {})


def test_the_original_video_llava_pads_images_where_its_config_says_so():
    assert config_of("video_llava_original").vision.resize == "pad"
    data = VIDEO_LLAVA_ORIGINAL | {"image_aspect_ratio": "square"}
    assert family_of(data).model_config(data, {}).vision.resize == "crop"
    assert config_of("video_llava").vision.resize == "crop"  # as transformers' processor does


def test_a_part_that_config_json_shortens_has_the_sizes_of_its_class():
    """`transformers` saves what differs from the class: of CLIP-L/14 at 224 no image_size."""
    data = VIDEO_LLAVA | {
        "text_config": {"vocab_size": 200},
        "vision_config": {"patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "intermediate_size": 4096},
    }  # fmt: skip
    config = family_of(data).model_config(data, {})
    vision, language = config.vision, config.language
    assert (vision.image_size, vision.activation, vision.epsilon) == (224, "quick_gelu", 1e-5)
    assert (language.width, language.depth, language.mlp_width) == (4096, 32, 11008)
    with pytest.raises(FamilyError, match="does not say vision_config"):
        family_of(data).model_config({"model_type": "video_llava"}, {})


def test_llava_onevision_of_llava_next_is_known_by_its_architecture():
    data = LLAVA_VIDEO | {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}
    assert family_of(data).name == "llava_qwen"
    assert family_of(data).model_config(data, {}) == config_of("llava_video")
    assert family_of(data | {"architectures": ["LlavaForConditionalGeneration"]}) is None


# As llava-hf's, openai's and LanguageBind's files have them, at the tiny size.
SIGLIP_PIXELS = {
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"height": 24, "width": 24},
    "do_center_crop": None, "crop_size": None,
}  # fmt: skip
CLIP_PIXELS = {
    "crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "do_normalize": True,
    "do_resize": True, "resample": 3, "size": {"shortest_edge": 24},
}  # fmt: skip


def test_published_preprocessors_are_taken():
    where = "preprocessor_config.json"
    config = family_of(LLAVA_ONEVISION).model_config(LLAVA_ONEVISION, {where: SIGLIP_PIXELS})
    assert config.vision.mean == (0.5, 0.4, 0.3)
    for pixels in (CLIP_PIXELS, CLIP_PIXELS | {"crop_size": 24, "size": 24}):
        for data in (LONGVA, VIDEO_LLAVA, VIDEO_LLAVA_ORIGINAL):
            family_of(data).model_config(data, {where: pixels})


@pytest.mark.parametrize("data, option, value", [
    (LLAVA_ONEVISION, "resample", 2), (LLAVA_ONEVISION, "do_center_crop", True),
    (LLAVA_ONEVISION, "size", {"shortest_edge": 24}), (LLAVA_ONEVISION, "do_normalize", False),
    (LLAVA_ONEVISION, "image_grid_pinpoints", [[24, 24]]), (LLAVA_ONEVISION, "do_flip", True),
    (VIDEO_LLAVA, "do_center_crop", False), (VIDEO_LLAVA, "size", {"height": 24, "width": 24}),
    (VIDEO_LLAVA, "crop_size", 20), (VIDEO_LLAVA, "rescale_factor", 1 / 127.5),
    (VIDEO_LLAVA, "do_pad", True), (VIDEO_LLAVA, "do_sample_frames", True),
])  # fmt: skip
def test_a_preprocessor_that_makes_other_pixels_is_refused(data, option, value):
    pixels = SIGLIP_PIXELS if data is LLAVA_ONEVISION else CLIP_PIXELS
    where = {"preprocessor_config.json": pixels, "elsewhere.json": pixels | {option: value}}
    with pytest.raises(FamilyError, match=re.escape(f"elsewhere.json: {option}={value!r}")):
        family_of(data).model_config(data, where)


PLACES = (
    "preprocessor_config.json", "video_processor/preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json: image_processor",
    "processor_config.json: video_processor",
)  # fmt: skip


def write_pixels(path, settings):
    """A folder of LLaVA-OneVision that has settings in these places."""
    (path / "config.json").write_text(json.dumps(LLAVA_ONEVISION))
    (path / "video_processor").mkdir(exist_ok=True)
    files = {}
    for place, values in settings.items():
        name, _, part = place.partition(": ")
        files.setdefault(name, {}).update({part: values} if part else values)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("place", PLACES)
def test_pixels_are_read_wherever_transformers_has_written_them(tmp_path, place):
    write_pixels(tmp_path, {place: SIGLIP_PIXELS})
    assert read_config(tmp_path, {})[1].vision.mean == (0.5, 0.4, 0.3)
    write_pixels(tmp_path, {place: SIGLIP_PIXELS | {"resample": 0}})
    with pytest.raises(FamilyError, match=re.escape(f"{place}: resample=0: this program has")):
        read_config(tmp_path, {})


def test_images_and_videos_have_the_same_pixels(tmp_path):
    write_pixels(tmp_path, dict.fromkeys(PLACES, SIGLIP_PIXELS))
    assert read_config(tmp_path, {})[1].vision.mean == (0.5, 0.4, 0.3)
    video = "processor_config.json: video_processor"
    write_pixels(tmp_path, {video: SIGLIP_PIXELS | {"image_std": [0.2, 0.2, 0.2]}})
    other = r"image_std=\[0.2, 0.2, 0.2\], but preprocessor_config.json has \[0.5, 0.5, 0.5\]"
    with pytest.raises(FamilyError, match=f"{video}: {other}"):
        read_config(tmp_path, {})


def test_llava_video_reads_its_modes():
    config = config_of("llava_video")
    connector = config.connector
    assert (connector.pool, connector.newline, connector.stride) == ("average", "grid", 2)
    assert connector.resolutions[:3] == ((24, 24), (48, 24), (72, 24)) and connector.max_tiles == 9
    sampling = family_of(LLAVA_VIDEO).sampling(LLAVA_VIDEO)
    assert (sampling.method, sampling.frames) == ("evenly", 64)  # force_sample
    assert sampling.time_instruction
    sampling = family_of(LLAVA_VIDEO).sampling(LLAVA_VIDEO | {"force_sample": False})
    assert (sampling.method, sampling.frames) == ("frames_at_one_fps", 64)
    with pytest.raises(FamilyError, match="frames_upbound=0: batches here have a fixed number"):
        family_of(LLAVA_VIDEO).sampling(LLAVA_VIDEO | {"frames_upbound": 0})
    fast = family_of(LLAVA_VIDEO).model_config(
        LLAVA_VIDEO | {"add_faster_video": True, "faster_token_stride": 10}, {})  # fmt: skip
    assert fast.connector.slow_every == 10


@pytest.mark.parametrize("said", [{}, {"image_grid_pinpoints": None}])
def test_resolutions_that_llava_onevision_does_not_say_are_those_of_its_class(said):
    """And not one view: the converter of `transformers` writes them, a shortened file need not."""
    data = {k: v for k, v in LLAVA_ONEVISION.items() if k != "image_grid_pinpoints"} | said
    connector = family_of(data).model_config(data, {}).connector
    assert connector.resolutions[:2] == ((384, 384), (384, 768)) and connector.max_tiles == 9
    assert len(connector.resolutions) == 36 and connector.resolutions[-1] == (2304, 2304)
    where = {"preprocessor_config.json": {"image_grid_pinpoints": [[24, 24]]}}
    with pytest.raises(FamilyError, match=r"but by config.json they are \[\(384, 384\), "):
        family_of(data).model_config(data, where)
    none = data | {"image_grid_pinpoints": []}
    assert family_of(none).model_config(none, {}).connector.resolutions == ()


def test_llava_onevision_of_transformers_shows_the_frames_that_it_is_told():
    sampling = family_of(LLAVA_ONEVISION).sampling
    assert sampling({"frames_upbound": 16}).frames == 16
    with pytest.raises(FamilyError, match="frames_upbound=900.*up to 512"):
        sampling({"frames_upbound": 900})


@pytest.mark.parametrize("option, value", [
    ("mm_image_tower", "openai/clip-vit-large-patch14"),
    ("mm_video_tower", "LanguageBind/LanguageBind_Video_FT"),
    ("mm_video_tower", "LanguageBind/LanguageBind_Image"),
])  # fmt: skip
def test_the_original_video_llava_has_the_towers_of_its_code(option, value):
    family = family_of(VIDEO_LLAVA_ORIGINAL)
    local = {"mm_image_tower": "cache_dir/LanguageBind_Image",
             "mm_video_tower": "/data/LanguageBind_Video_merge/"}  # fmt: skip
    family.model_config(VIDEO_LLAVA_ORIGINAL | local, {})
    with pytest.raises(FamilyError, match=f"{option}='{value}': this program has only LanguageBi"):
        family.model_config(VIDEO_LLAVA_ORIGINAL | {option: value}, {})


def test_languagebind_has_the_sizes_and_the_activation_of_datacomps_clip():
    """CLIP-ViT-L-14-DataComp.XL-s13B-b90K, whose GELU is exact; that of OpenAI's CLIP is not."""
    data = {k: v for k, v in VIDEO_LLAVA_ORIGINAL.items() if k != "vision_config"}
    vision = family_of(data).model_config(data, {}).vision
    assert (vision.kind, vision.activation, vision.epsilon) == ("languagebind", "gelu", 1e-5)
    assert (vision.width, vision.depth, vision.heads, vision.mlp_width) == (1024, 24, 16, 4096)
    assert (vision.image_size, vision.patch_size, vision.frames, vision.layer) == (224, 14, 8, -2)


def test_longva_reads_the_layer_before_last_and_has_no_newlines():
    config = config_of("longva")
    assert config.vision.kind == "clip" and config.vision.layer == -2
    assert (config.connector.image, config.connector.newline) == ("pool", "no_token")
    assert config.language.rope_theta == 1e9
    assert config.num_visual_tokens(4) == 4 and config.num_visual_tokens(1) == 1


def test_published_sizes():
    """LLaVA-Video-7B's and VideoChat-TPO's own config.json, without the tiny overrides."""
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    }  # fmt: skip
    data = LLAVA_VIDEO | text | {"mm_vision_tower": "google/siglip-so400m-patch14-384"}
    del data["vision_config"]
    config = family_of(data).model_config(data, {})
    vision = config.vision
    assert (vision.depth, vision.layers_run, vision.width // vision.heads) == (26, 26, 72)
    assert config.num_visual_tokens(64) == 11_648
    longva = LONGVA | text | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    del longva["vision_config"]
    config = family_of(longva).model_config(longva, {})
    assert config.vision.layers_run == 23 and config.num_visual_tokens(32) == 4_608
    tpo = copy.deepcopy(VIDEOCHAT)
    del tpo["llm_config"], tpo["qformer_config"]
    tpo["model_config"]["llm"] |= {"lora_r": 16, "lora_alpha": 32}
    tpo["model_config"]["bridge"] |= {"num_query_token": 32, "extra_num_query_token": 64}
    tpo["model_config"]["vision_encoder"] |= {
        "img_size": 224, "patch_size": 16, "encoder_embed_dim": 1024, "encoder_depth": 24,
        "encoder_num_heads": 16, "num_frames": 16,
    }  # fmt: skip
    config = family_of(tpo).model_config(tpo, {})
    assert config.num_visual_tokens(16) == config.num_visual_tokens(1) == 96
    sizes = {
        part: sum(int(np.prod(x.shape)) for path, x in tree if path.startswith(part))
        for tree in [list(flatten(FunctionalModel(config).abstract()).items())]
        for part in ("vision/", "connector/", "language/")
    }
    # 290.5 M and 2 K of the norm behind it, 32007 of 32128 rows of the tables and LoRA.
    assert round(sizes["vision/"] / 1e6, 1) == 290.5
    assert config.language.num_tokens == 32007
    padding = config.language.vocab_size - 32007
    rows = 2 * padding * 4096 + 16 * padding
    assert round((sizes["language/"] - rows) / 1e6) == round(7242 + 42.5)


@pytest.mark.parametrize("written", [
    "[(384, 768), (768, 384)]", [[384, 768], [768, 384]], "(1x2),(2x1)",
])  # fmt: skip
def test_resolutions_are_width_first_on_disk(written):
    assert resolutions(written, 384) == ((768, 384), (384, 768))
