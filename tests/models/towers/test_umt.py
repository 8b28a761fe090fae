import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.towers import oracle
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.registry import make_tower
from tpo_jax.models.towers.umt import position_table

CONFIG = TowerConfig(
    kind="umt", image_size=8, patch_size=4, width=8, depth=2, heads=2, mlp_width=12,
    activation="gelu", epsilon=1e-6, layer=-1, max_frames=16, frames=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tower():
    return oracle.random_module(functools.partial(make_tower, CONFIG))


@pytest.mark.parametrize("frames", [1, 4, 6, 16])
def test_positions_are_interpolated_in_time(frames):
    expected = oracle.umt_positions(frames, 4, 4, 8)
    np.testing.assert_allclose(position_table(CONFIG, frames), expected, atol=1e-6)


@pytest.mark.parametrize("frames, valid", [(6, 6), (6, 4), (1, 1)])
def test_all_patches_of_a_clip_see_each_other(tower, frames, valid):
    rng = np.random.default_rng(1)
    clip = rng.normal(size=(frames, 8, 8, 3)).astype(np.float32)
    mask = np.arange(frames) < valid
    found = oracle.run(tower, jnp.asarray(clip[None]), jnp.asarray(mask[None]))
    expected = oracle.umt(oracle.params_of(tower), CONFIG, clip, valid).reshape(frames, 2, 2, 8)
    np.testing.assert_allclose(found.patches[0, :valid], expected[:valid], atol=2e-5)


def test_another_size_is_refused(tower):
    with pytest.raises(ValueError, match="frames of 12 x 12.*image_size=8"):
        tower(jnp.zeros((1, 2, 12, 12, 3)), jnp.ones((1, 2), bool))
