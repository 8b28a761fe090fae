import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.towers import oracle
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.registry import make_tower

CONFIG = TowerConfig(
    kind="languagebind", image_size=12, patch_size=4, width=8, depth=3, heads=2, mlp_width=12,
    activation="quick_gelu", epsilon=1e-5, layer=-2, max_frames=4, frames=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tower():
    return oracle.random_module(functools.partial(make_tower, CONFIG))


def _clip(frames, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, frames, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("valid", [(1, 1, 1, 1), (1, 1, 1, 0)])
def test_video_tower_attends_over_time_at_each_token(tower, valid):
    clip = _clip(4)
    valid = np.array(valid, bool)
    found = oracle.run(tower, jnp.asarray(clip), jnp.asarray(valid[None]))
    params = oracle.params_of(tower)["video_tower"]
    expected = oracle.languagebind(params, CONFIG, clip[0], valid)
    np.testing.assert_allclose(
        found.patches[0].reshape(4, 9, 8)[valid], expected[valid, 1:], atol=2e-5
    )
    np.testing.assert_allclose(found.class_token[0, valid], expected[valid, 0], atol=2e-5)


def test_a_clip_of_one_frame_goes_through_the_image_tower(tower):
    clip = _clip(1)
    found = oracle.run(tower, jnp.asarray(clip), jnp.ones((1, 1), bool))
    params = oracle.params_of(tower)["image_tower"]
    expected = oracle.languagebind(params, CONFIG, clip[0], [True])
    np.testing.assert_allclose(found.patches[0].reshape(1, 9, 8), expected[:, 1:], atol=2e-5)
    assert found.class_token is None


def test_more_frames_than_the_time_embedding_has_are_refused(tower):
    with pytest.raises(ValueError, match=r"clip of 5 frames.*has 4 \(vision.frames\)"):
        tower(jnp.asarray(_clip(5)), jnp.ones((1, 5), bool))
