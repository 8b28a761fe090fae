"""The configs of the published families: full size as published, and tiny ones that train."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from fake_batches import bucket, random_batch, small_params
from jax.sharding import AbstractMesh, AxisType

from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.interop.folder import write_model
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import AXES, global_batch, make_mesh
from tpo_jax.parallel.paths import flatten, map_with_path
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.train import make_model_config
from tpo_jax.training.config import validate
from tpo_jax.training.families import TOKENIZER
from tpo_jax.training.program import make_program
from tpo_jax.training.step import parts_of

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def config_of(name, arg):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    validate(config)
    return config


def batch_of(config, model_config):
    """A random batch of the config's frames, with the images that stand beside."""
    fields = {"slots": {}, "windows": 0, "mask_size": 0}
    video = config.buckets.video
    batch = random_batch(bucket(8, frames=video.frames, **fields), model_config)
    if video.beside:
        batch["beside"] = images_of(random_batch(bucket(8, **fields), model_config), model_config)
    known = model_config.language.num_tokens

    def in_use(path, leaf):
        return leaf % known if path.endswith("_tokens") else leaf

    return map_with_path(in_use, batch)


def images_of(batch, model_config):
    """The batch cut down to one frame and the prefix of an image."""
    length = model_config.visual_offset + model_config.num_visual_tokens(1) + 1
    out = {name: batch[name][:, :1] for name in ("frames", "frame_times", "frame_valid")}
    prefixes = ("prefix_tokens", "prefix_positions", "prefix_segments")
    return batch | out | {name: batch[name][:, :length] for name in prefixes}


@pytest.mark.parametrize("name, arg", [
    ("llava_onevision", "tiny"), ("video_llava", "tiny,stage=2"),
    pytest.param("videochat2", "tiny", marks=pytest.mark.long),
    pytest.param("llava_video", "tiny", marks=pytest.mark.long),
    pytest.param("longva", "tiny", marks=pytest.mark.long),
    pytest.param("video_llava", "tiny,stage=1", marks=pytest.mark.long),
    pytest.param("siglip2_qwen3", "tiny,stage=2", marks=pytest.mark.long),
])  # fmt: skip
def test_a_tiny_model_trains_on_eight_devices(name, arg):
    config = config_of(name, arg)
    config.optimizer.warmup = 0.0
    config.trainable = [[group, 1e-2] for group, _ in config.trainable]
    model_config, _ = make_model_config(config)
    mesh = make_mesh({"data": -1, "fsdp": 2}, jax.devices())
    program = make_program(config, model_config, mesh)
    before = small_params(program.abstract_state.params)
    batch = batch_of(config, model_config)
    compiled = program.compile_train_step(batch)
    state, key = program.init_state(before), program.base_key(0)
    losses = []
    for _ in range(3):
        state, metrics = compiled(state, global_batch(batch, mesh), key)
        losses.append(float(metrics["language"].mean()))
    assert losses[2] < losses[0], losses
    after, trained, moved = flatten(state.params), program.trainable, set()
    for path, leaf in flatten(before).items():
        if not np.array_equal(np.asarray(after[path]), leaf):
            moved.add(path)
    assert moved <= trained and len(moved) > len(trained) // 2


def test_images_and_videos_of_one_step_count_like_one_batch():
    """The loss of a joint step is the sum over both parts divided by the labels of both."""
    config = config_of("video_llava", "tiny,stage=1")
    model_config, _ = make_model_config(config)
    program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
    params = small_params(program.abstract_state.params)
    batch = batch_of(config, model_config)
    first, second = parts_of(batch)
    evaluate = {}
    for name, part in (("video", first), ("image", second), ("joint", batch)):
        compiled = program.eval_step.lower(params, part).compile()
        evaluate[name] = compiled(params, part)["language"]
    total = float(evaluate["video"].total + evaluate["image"].total)
    weight = float(evaluate["video"].weight + evaluate["image"].weight)
    assert float(evaluate["joint"].weight) == weight > float(evaluate["video"].weight)
    np.testing.assert_allclose(float(evaluate["joint"].total), total, rtol=1e-5)
    step = program.compile_train_step(batch)
    _, metrics = step(program.init_state(params), batch, program.base_key(0))
    np.testing.assert_allclose(float(metrics["loss"].mean()), total / weight, rtol=1e-5)


def running(model_config):
    """How a model runs: attention, remat of both towers, dtype."""
    vision, language = model_config.vision, model_config.language
    return language.attention, language.remat, vision.remat, model_config.dtype


@pytest.mark.parametrize("name", ["llava_video", "longva_tpo"])
def test_imported_weights_run_as_the_planned_model(tmp_path, name):
    """Whatever the folder says, which may be one of before runs chose these options."""
    family = name.removesuffix("_tpo")
    codec = TextCodec(train_tokenizer(["a red square moves"], 300))
    about = preset(f"{family}_tiny").to_dict()
    about["language"] |= {"attention": "xla", "remat": False}
    write_model(tmp_path / "base", about, {}, codec)
    config = config_of(name, f"init={tmp_path / 'base'}")
    imported, _ = make_model_config(config)
    assert running(imported) == ("auto", "full", "full", "bfloat16")
    config.model.preset, config.init_from, config.tokenizer = f"{family}_7b", "", TOKENIZER
    assert running(make_model_config(config)[0]) == running(imported)
    tiny, _ = make_model_config(config_of(name, f"tiny,init={tmp_path / 'base'}"))
    assert running(tiny) == ("auto", "", "", "float32")


def test_attention_is_that_of_the_devices_that_a_program_is_for():
    config = config_of("llava_video", "tiny")
    config.model.dtype = "bfloat16"
    model_config, _ = make_model_config(config)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def kernel(model_config, platform):
        program = make_program(config, model_config, mesh, platform)
        return program.model.config.language.attention

    found = {platform: kernel(model_config, platform) for platform in ("cpu", "gpu", "tpu")}
    assert found == {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
    assert kernel(dataclasses.replace(model_config, dtype="float32"), "gpu") == "xla"
    with pytest.raises(ValueError, match="model.attention='splash': runs on tpu and .* are cpu"):
        kernel(model_config.running(attention="splash", remat=""), "cpu")


@pytest.mark.parametrize("name, arg, parameters, tokens", [
    ("llava_onevision", "", 8.03, 196 * 32 + 1), ("llava_video", "", 8.03, 210 * 64),
    ("llava_video", "frames=32", 8.03, 210 * 32), ("longva", "frames=128", 7.94, 144 * 128),
    ("video_llava", "stage=1", 7.47, 257 * 8), ("videochat2", "", 7.68, 96),
    # 494,032,768 of Qwen2-0.5B, 8,190,735,360 of Qwen3-8B.
    ("llava_onevision", "size=0.5b", 0.89, 196 * 32 + 1),
    ("siglip2_qwen3", "stage=1", 8.62, 64 * 32),
])  # fmt: skip
def test_full_sizes(name, arg, parameters, tokens):
    config = config_of(name, arg)
    model_config = preset(config.model.preset)
    abstract = FunctionalModel(model_config).abstract()
    total = sum(int(np.prod(leaf.shape)) for leaf in flatten(abstract).values())
    assert round(total / 1e9, 2) == parameters
    assert model_config.num_visual_tokens(config.buckets.video.frames) == tokens
    # Every large leaf has a rule and divides over 8 devices.
    param_shardings(abstract, make_mesh({"data": 1, "fsdp": 8}, jax.devices()))


@pytest.mark.parametrize("arg", ["tpo", "tiny,tpo"])
def test_the_heads_of_videochat_tpo(arg):
    """Every leaf has a rule, the mask head answers at the bucket's size, SAM 2 is frozen."""
    config = config_of("videochat2", arg)
    model_config, _ = make_model_config(config)
    assert model_config.mask_size == config.buckets.video.mask_size
    abstract = FunctionalModel(model_config).abstract()
    param_shardings(abstract, make_mesh({"data": 1, "fsdp": 8}, jax.devices()))
    groups = [group for group, _ in config.trainable]
    trained = {path for path in flatten(abstract) if any(re.match(g, path) for g in groups)}
    assert {"heads/region_mlp/mlp/fc1/kernel", "heads/sam2/adapter/fc2/bias",
            "heads/sam2/box_readout/fc2/bias", "task_tokens/region", "task_tokens/mask",
            "box_encoder/fc1/bias"} <= trained  # fmt: skip
    assert not any(path.startswith("heads/sam2/network/") for path in trained)


@pytest.mark.parametrize("arg, images, idle", [("", 0.5, []), ("tpo", 0.5343, ["mask"])])
def test_videochat_is_shown_images_as_often_as_it_is_asked_about_them(arg, images, idle):
    """Half of VideoChat2-IT; of 3,556,500 questions of stage 3, 1,900,000."""
    video, image = (config_of("videochat2", arg).buckets[name] for name in ("video", "image"))
    assert image.weight / (image.weight + video.weight) == pytest.approx(images, abs=1e-4)
    assert (image.frames, image.batch_size, image.mask_size) == (1, 128, video.mask_size)
    assert list(image.idle) == idle and not video.idle
    videos = config_of("videochat2", f"{arg},media=video")
    assert list(videos.buckets) == ["video"]
    with pytest.raises(ValueError, match="media=audio: expected video, image or video.image"):
        config_of("videochat2", "media=audio")


def test_the_published_hyper_parameters():
    one, two = config_of("video_llava", "stage=1"), config_of("video_llava", "stage=2")
    for config, rate, batch in ((one, 1e-3, 256), (two, 2e-5, 128)):
        buckets = config.buckets
        assert buckets.video.beside == "image"
        assert buckets.video.batch_size + buckets.image.batch_size == batch
        assert config.trainable[0][1] == rate and config.optimizer.weight_decay == 0.0
    assert one.trainable[0][0] == "connector/" and two.trainable[0][0] == "connector/|language/"
    assert config_of("llava_video", "").trainable == [["vision/", 2e-6], [".*", 1e-5]]
    assert config_of("videochat2", "").optimizer.weight_decay == 0.02


@pytest.mark.parametrize("name, arg, rows, steps", [
    ("llava_onevision", "", 256, 6_250),  # 1.6 M
    ("llava_video", "", 256, 10_547),  # 2.7 M
    ("video_llava", "stage=1", 256, 4_922),  # 558 K and 702 K
    ("video_llava", "stage=2", 128, 5_977),  # 665 K and 100 K
    ("videochat2", "", 128, 46_875),  # 3 x 2 M
    ("videochat2", "tpo", 128, 83_356),  # 3 x 3,556,500
    ("longva", "", 64, 1_000),  # not published
    ("longva", "samples=640001", 64, 10_001), ("videochat2", "samples=1280", 128, 30),
    ("llava_onevision", "tiny,samples=640000", 8, 3),
])  # fmt: skip
def test_steps_are_the_published_epochs(name, arg, rows, steps):
    config = config_of(name, arg)
    video = config.buckets.video
    beside = config.buckets[video.beside].batch_size if video.beside else 0
    assert (video.batch_size + beside, config.steps) == (rows, steps)


def test_configs_say_what_is_not_trained_as_published():
    section = (CONFIGS.parent / "docs/families.md").read_text().split("## Published mixes\n")[1]
    for name in ("llava_onevision", "llava_video", "longva", "video_llava", "videochat2"):
        about = " ".join((CONFIGS / f"{name}.py").read_text().split('"""')[1].split())
        assert 'docs/families.md, "Published mixes"' in about
        assert config_of(name, "").buckets.video.branches == 1 and "`branches=1`" in section


def test_the_published_schedules():
    for name in ("llava_onevision", "llava_video", "longva"):
        config = config_of(name, "")
        assert config.trainable == [["vision/", 2e-6], [".*", 1e-5]]
        assert (config.optimizer.warmup, config.optimizer.weight_decay) == (0.03, 0.0)
        assert config.optimizer.clip == 1.0  # of the Trainer of transformers
    optimizer = config_of("videochat2", "").optimizer
    assert [config_of("videochat2", arg).optimizer.clip for arg in ("", "tpo")] == [0.0, 1.0]
    # 0.6 of 3 epochs.
    assert (optimizer.warmup, optimizer.min_lr_ratio) == (0.2, 0.25)
