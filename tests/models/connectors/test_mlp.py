"""The MLP connector against float64 NumPy, token by token."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.connectors.oracle import pool_grid, project, video_tokens
from tests.models.towers import oracle
from tpo_jax.models.connectors.config import MlpConnectorConfig
from tpo_jax.models.connectors.registry import make_connector
from tpo_jax.models.vision import VisionFeatures

GRID, WIDTH, LANGUAGE = 5, 3, 4


def _config(pool, newline, image="plain", **changes):
    return MlpConnectorConfig(pool=pool, newline=newline, image=image, **changes)


def _connector(config):
    make = functools.partial(make_connector, config, WIDTH, LANGUAGE)
    return oracle.random_module(make)


def _features(frames, seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(2, frames, GRID, GRID, WIDTH)).astype(np.float32)
    token = rng.normal(size=(2, frames, WIDTH)).astype(np.float32)
    return VisionFeatures(jnp.asarray(patches), jnp.asarray(patches), jnp.asarray(token))


@pytest.mark.parametrize("pool, newline, slow_every", [
    ("none", "no_token", 0), ("average", "grid", 0), ("max", "frame", 0),
    ("bilinear", "one_token", 0), ("average", "no_token", 0), ("bilinear", "grid", 2),
])  # fmt: skip
def test_video_tokens(pool, newline, slow_every):
    config = _config(pool, newline, slow_every=slow_every)
    connector, features = _connector(config), _features(5)
    found = oracle.run(connector, features, jnp.ones((2, 5), bool))
    params = oracle.params_of(connector)
    clips = project(params, features.patches)
    expected = np.stack([video_tokens(config, params, clip) for clip in clips])
    assert len(config.visual_frames(5, GRID)) == expected.shape[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("image, count", [("plain", 25), ("newline", 26), ("pool", 4)])
def test_image_tokens(image, count):
    config = _config("average", "no_token", image)
    connector, features = _connector(config), _features(1)
    found = oracle.run(connector, features, jnp.ones((2, 1), bool))
    params = oracle.params_of(connector)
    for row, grid in zip(found, project(params, features.patches)[:, 0], strict=True):
        grid = pool_grid(grid, "average", 2) if image == "pool" else grid
        expected = list(grid.reshape(-1, LANGUAGE))
        if image == "newline":
            expected.append(params["image_newline"])
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert found.shape[1] == len(config.visual_frames(1, GRID)) == count


def test_the_class_token_goes_before_the_patches_of_its_frame():
    config = _config("none", "no_token", class_token=True)
    connector, features = _connector(config), _features(3)
    found = oracle.run(connector, features, jnp.ones((2, 3), bool)).reshape(2, 3, 26, LANGUAGE)
    params = oracle.params_of(connector)
    np.testing.assert_allclose(found[:, :, 0], project(params, features.class_token), atol=1e-5)
    patches = project(params, features.patches).reshape(2, 3, 25, LANGUAGE)
    np.testing.assert_allclose(found[:, :, 1:], patches, atol=1e-5)
    assert len(config.visual_frames(3, GRID)) == 78


def test_which_frame_a_token_needs():
    assert _config("max", "grid").visual_frames(2, 5).tolist() == [0] * 6 + [1] * 6
    ends = _config("bilinear", "one_token").visual_frames(2, 5)
    assert ends.tolist() == [0] * 9 + [1] * 9 + [0]


@pytest.mark.parametrize("pool, newline, frames, tokens", [
    ("average", "grid", 64, 11_648), ("bilinear", "grid", 32, 6_720), ("max", "grid", 32, 5_824),
    ("bilinear", "one_token", 32, 196 * 32 + 1),
])  # fmt: skip
def test_published_counts(pool, newline, frames, tokens):
    """LLaVA-Video and LLaVA-OneVision, 27 x 27 patches."""
    assert len(_config(pool, newline).visual_frames(frames, 27)) == tokens


def test_longva_and_video_llava_counts():
    assert len(_config("average", "no_token", "pool").visual_frames(32, 24)) == 4_608
    video_llava = _config("none", "no_token", class_token=True)
    assert len(video_llava.visual_frames(8, 16)) == 2_056
    assert len(video_llava.visual_frames(1, 16)) == 256


@pytest.mark.parametrize("changes, message", [
    ({"pool": "mean"}, "connector.pool='mean': use one of"),
    ({"newline": "row"}, "connector.newline='row': use one of"),
    ({"image": "tiles"}, "connector.image='tiles': use one of"),
    ({"class_token": True}, "connector.class_token=True: a class token has no place in a grid"),
    ({"slow_every": 3, "newline": "frame"}, "connector.slow_every=3: exists only with newline"),
])  # fmt: skip
def test_a_wrong_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_config("average", "grid"), **changes)
