"""The configs of the published families: full size as published, and tiny ones that train."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from fake_batches import FAST_COMPILE, bucket, random_batch

from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import global_batch, make_mesh
from tpo_jax.parallel.paths import flatten, map_with_path
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.train import make_model_config
from tpo_jax.training.config import validate
from tpo_jax.training.program import make_program

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def config_of(name, arg):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    validate(config)
    return config


def small_params(abstract):
    """Small random numbers, norms of one; nothing is drawn on a device."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith("scale"):
            return np.ones(leaf.shape, np.float32)
        return (0.05 * rng.normal(size=leaf.shape)).astype(np.float32)

    return map_with_path(draw, abstract)


@pytest.mark.parametrize("name, arg, frames", [
    ("llava_onevision", "tiny", 4), ("llava_video", "tiny", 4), ("longva", "tiny", 4),
    ("video_llava", "tiny,stage=1", 4), ("video_llava", "tiny,stage=2", 1),
    ("videochat2", "tiny", 4),
])  # fmt: skip
def test_a_tiny_model_trains_on_eight_devices(name, arg, frames):
    config = config_of(name, arg)
    config.optimizer.warmup = 0.0
    config.trainable = [[group, 1e-2] for group, _ in config.trainable]
    model_config, _ = make_model_config(config)
    mesh = make_mesh({"fsdp": 2}, jax.devices())
    program = make_program(config, model_config, mesh)
    before = small_params(program.abstract_state.params)
    media = "image" if frames == 1 else "video"
    shapes = bucket(8, media=media, frames=max(frames, 2), slots={}, windows=0, mask_size=0)
    batch = random_batch(shapes, model_config)
    if frames == 1:
        shapes = bucket(8, media="image", frames=1, slots={}, windows=0, mask_size=0)
        wide, batch = batch, random_batch_of_images(shapes, model_config, batch)
        assert wide["prefix_tokens"].shape[1] > batch["prefix_tokens"].shape[1]
    compiled = program.lower_train_step(batch).compile(FAST_COMPILE)
    state, key = program.init_state(before), program.base_key(0)
    losses = []
    for _ in range(3):
        state, metrics = compiled(state, global_batch(batch, mesh), key)
        losses.append(float(metrics["language"].mean()))
    assert losses[2] < losses[0], losses
    after, trained = flatten(state.params), program.trainable
    for path, leaf in flatten(before).items():
        moved = not np.array_equal(np.asarray(after[path]), leaf)
        if path not in trained:
            assert not moved, path
    assert trained and any(
        not np.array_equal(np.asarray(after[path]), flatten(before)[path]) for path in trained
    )


def random_batch_of_images(shapes, model_config, batch):
    """The batch cut down to one frame and the prefix of an image."""
    length = model_config.visual_offset + model_config.num_visual_tokens(shapes.frames) + 1
    out = dict(batch)
    for name in ("frames", "frame_times", "frame_valid"):
        out[name] = batch[name][:, :1]
    for name in ("tokens", "positions", "segments"):
        out[f"prefix_{name}"] = batch[f"prefix_{name}"][:, :length]
    return out


@pytest.mark.parametrize("name, arg, parameters, tokens", [
    ("llava_onevision", "", 8.03, 196 * 32 + 1), ("llava_video", "", 8.03, 210 * 64),
    ("llava_video", "frames=32", 8.03, 210 * 32), ("longva", "frames=128", 7.93, 144 * 128),
    ("video_llava", "stage=1", 7.46, 257 * 8), ("videochat2", "", 7.77, 96),
])  # fmt: skip
def test_full_sizes(name, arg, parameters, tokens):
    config = config_of(name, arg)
    model_config = preset(config.model.preset)
    from tpo_jax.models.video_language import FunctionalModel

    abstract = FunctionalModel(model_config).abstract()
    total = sum(int(np.prod(leaf.shape)) for leaf in flatten(abstract).values())
    assert round(total / 1e9, 2) == parameters
    assert model_config.num_visual_tokens(config.buckets.video.frames) == tokens
    # Every large leaf has a rule and divides over 8 devices.
    param_shardings(abstract, make_mesh({"data": 1, "fsdp": 8}, jax.devices()))


def test_the_published_hyper_parameters():
    one, two = config_of("video_llava", "stage=1"), config_of("video_llava", "stage=2")
    assert one.trainable == [["connector/", 1e-3]] and one.buckets.video.batch_size == 256
    assert two.trainable == [["connector/|language/", 2e-5]]
    assert two.buckets.image.batch_size == 128 and two.optimizer.weight_decay == 0.0
    assert config_of("llava_video", "").trainable == [["vision/", 2e-6], [".*", 1e-5]]
    assert config_of("videochat2", "").optimizer.weight_decay == 0.02
