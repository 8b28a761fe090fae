import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.config import ConnectorConfig
from tpo_jax.models.connector import TIME_WAVES, Connector, time_waves
from tpo_jax.models.presets import micro
from tpo_jax.models.vision import VisionEncoder, add_motion, to_patches

CONFIG = micro().vision


@pytest.fixture(scope="module")
def encoder():
    structure, state = nnx.split(VisionEncoder(CONFIG, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda state, *arguments: nnx.merge(structure, state)(*arguments))
    return functools.partial(run, state)


def _frames(seed, B, F):
    return jax.random.normal(jax.random.key(seed), (B, F, 32, 32, 3))


def test_patches_hold_their_pixels_row_by_row():
    image = jnp.arange(4 * 4 * 3).reshape(4, 4, 3)
    patches = to_patches(image, 2)
    assert patches.shape == (2, 2, 12)
    np.testing.assert_array_equal(patches[1, 0], np.asarray(image[2:4, 0:2]).reshape(-1))


def test_motion_is_the_change_since_the_frame_before():
    frames = _frames(3, 2, 4)
    both = add_motion(frames)
    np.testing.assert_array_equal(both[..., :3], frames)
    np.testing.assert_array_equal(both[:, 0, ..., 3:], 0.0)
    np.testing.assert_array_equal(both[:, 2, ..., 3:], frames[:, 2] - frames[:, 1])


def test_shapes_of_a_video_and_of_an_image(encoder):
    for F in (5, 1):
        features = encoder(_frames(0, 2, F), jnp.ones((2, F), bool))
        assert features.stem.shape == (2, F, 8, 8, 16)
        assert features.patches.shape == (2, F, 4, 4, 32)


def test_padded_frames_are_not_seen(encoder):
    frames = _frames(1, 1, 4)
    valid = jnp.array([[True, True, False, False]])
    other = frames.at[:, 2:].set(7.0)
    a, b = encoder(frames, valid).patches, encoder(other, valid).patches
    np.testing.assert_allclose(a[:, :2], b[:, :2], atol=1e-6)
    shorter = encoder(frames[:, :2], valid[:, :2]).patches
    np.testing.assert_allclose(a[:, :2], shorter, atol=1e-5)
    seen = encoder(other, jnp.ones((1, 4), bool)).patches
    assert np.abs(seen[:, :2] - a[:, :2]).max() > 1e-3


def test_order_of_frames_matters(encoder):
    frames, valid = _frames(2, 1, 4), jnp.ones((1, 4), bool)
    forward = encoder(frames, valid).patches
    backward = encoder(frames[:, ::-1], valid).patches[:, ::-1]
    assert np.abs(forward - backward).max() > 1e-3


def test_frames_are_independent_without_temporal_attention():
    config = dataclasses.replace(
        CONFIG, temporal="none", motion=False, stem_strides=(8,), stem_widths=(32,)
    )
    encoder = VisionEncoder(config, rngs=nnx.Rngs(0))
    frames, valid = _frames(3, 1, 3), jnp.ones((1, 3), bool)
    together = encoder(frames, valid).patches
    alone = encoder(frames[:, 1:2], valid[:, :1]).patches
    np.testing.assert_allclose(together[:, 1:2], alone, atol=1e-5)


def test_too_many_frames_is_named(encoder):
    with pytest.raises(ValueError, match="clip of 9 frames, but vision.max_frames=8"):
        encoder(_frames(0, 1, 9), jnp.ones((1, 9), bool))


def test_connector_keeps_frames_apart_and_in_order():
    connector = Connector(ConnectorConfig(grid=2, hidden=8), 6, 10, rngs=nnx.Rngs(0))
    patches = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 6))
    times = jnp.arange(3.0)[None]
    tokens = connector(patches, times)
    assert tokens.shape == (1, 12, 10)
    changed = connector(patches.at[0, 1, 2:, :2].add(1.0), times)
    moved = np.flatnonzero(np.abs(changed - tokens)[0].max(axis=-1) > 1e-6)
    # Frame 1, lower left of its 2 x 2 tokens.
    assert moved.tolist() == [4 + 2]


def test_visual_tokens_tell_the_second_of_their_frame():
    config = ConnectorConfig(grid=2, hidden=8, time_periods=(1.0, 64.0))
    connector = Connector(config, 6, 10, rngs=nnx.Rngs(0))
    same = jnp.tile(jax.random.normal(jax.random.key(0), (1, 1, 4, 4, 6)), (1, 3, 1, 1, 1))
    tokens = np.asarray(connector(same, jnp.array([[2.0, 5.5, 2.0]]))).reshape(3, 4, 10)
    np.testing.assert_array_equal(tokens[0], tokens[2])
    shift = tokens[1] - tokens[0]  # the same for all tokens of a frame
    assert np.abs(shift).max() > 0.1
    np.testing.assert_allclose(shift, np.tile(shift[:1], (4, 1)), atol=1e-6)


def test_time_waves_have_the_periods_asked_for():
    waves = np.asarray(time_waves(jnp.array([[0.25, 16.0]]), (1.0, 64.0)))
    assert waves.shape == (1, 2, 2 * TIME_WAVES)
    sines, cosines = np.split(waves[0], 2, axis=-1)
    # A quarter of the shortest period and of the longest one.
    np.testing.assert_allclose([sines[0, 0], sines[1, -1]], 1.0, atol=1e-5)
    np.testing.assert_allclose([cosines[0, 0], cosines[1, -1]], 0.0, atol=1e-5)
