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


def _table(frames):
    """[frames, 4, 8] by the definition: the table of four frames, linear between their centres."""
    trained = 1 if frames == 1 else 4
    table = np.empty((trained, 4, 8))
    for f in range(trained):
        for place in range(4):
            for j in range(8):
                angle = (f * 4 + place) / 10000 ** (2 * (j // 2) / 8)
                table[f, place, j] = np.cos(angle) if j % 2 else np.sin(angle)
    out = np.empty((frames, 4, 8))
    for f in range(frames):
        at = min(max((f + 0.5) * trained / frames - 0.5, 0.0), trained - 1)
        low = min(int(at), trained - 1)
        high = min(low + 1, trained - 1)
        out[f] = table[low] * (1 - (at - low)) + table[high] * (at - low)
    return out


@pytest.mark.parametrize("frames", [1, 4, 6, 16])
def test_positions_are_interpolated_in_time(frames):
    np.testing.assert_allclose(position_table(CONFIG, frames), _table(frames), atol=1e-6)


@pytest.mark.parametrize("frames, valid", [(6, 6), (6, 4), (1, 1)])
def test_all_patches_of_a_clip_see_each_other(tower, frames, valid):
    rng = np.random.default_rng(1)
    clip = rng.normal(size=(frames, 8, 8, 3)).astype(np.float32)
    mask = np.arange(frames) < valid
    found = oracle.run(tower, jnp.asarray(clip[None]), jnp.asarray(mask[None]))
    params = oracle.params_of(tower)
    patch = params["patch_embedding"]
    x = np.stack([oracle.conv_patches(patch["kernel"], patch["bias"], f) for f in clip])
    x = (x.reshape(frames, 4, 8) + _table(frames)).reshape(frames * 4, 8)
    for index in range(2):
        p = oracle.layer(params["layers"], index)
        normal = oracle.norm(p["norm1"], x, 1e-6)
        q, k, v = np.split(normal @ p["attn"]["qkv"]["kernel"], 3, axis=-1)
        q, v, seen = q + p["attn"]["q_bias"], v + p["attn"]["v_bias"], slice(0, valid * 4)
        x = x + oracle.linear(p["attn"]["proj"], oracle.attend(q, k[seen], v[seen], 2))
        hidden = oracle.gelu(oracle.linear(p["mlp"]["fc1"], oracle.norm(p["norm2"], x, 1e-6)))
        x = x + oracle.linear(p["mlp"]["fc2"], hidden)
    expected = oracle.norm(params["post_layernorm"], x, 1e-12).reshape(frames, 2, 2, 8)
    np.testing.assert_allclose(found.patches[0, :valid], expected[:valid], atol=2e-5)


def test_another_size_is_refused(tower):
    with pytest.raises(ValueError, match="frames of 12 x 12.*image_size=8"):
        tower(jnp.zeros((1, 2, 12, 12, 3)), jnp.ones((1, 2), bool))
