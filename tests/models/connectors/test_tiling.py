"""Tokens of images in tiles against NumPy that follows the published steps, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.connectors.oracle import pool_grid, project
from tests.models.towers import oracle
from tpo_jax.errors import UserError
from tpo_jax.models.connectors.anyres import best_resolution, packed_size, unpadded
from tpo_jax.models.connectors.config import MlpConnectorConfig
from tpo_jax.models.connectors.registry import make_connector
from tpo_jax.models.connectors.tiling import Tiling, tiling_of, visual_frames
from tpo_jax.models.presets import preset
from tpo_jax.models.vision import VisionFeatures

WIDTH, LANGUAGE, SIDE, ROOM = 3, 4, 10, 6
GRIDS = tuple((SIDE * rows, SIDE * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
NEWLINES = MlpConnectorConfig(
    pool="bilinear", newline="one_token", image="newline", resolutions=GRIDS, max_tiles=3
)
UNIRES = MlpConnectorConfig(pool="average", newline="no_token", image="pool", resolutions=GRIDS)
TILINGS = [Tiling(NEWLINES, SIDE, 3), Tiling(UNIRES, SIDE, 5)]
# (height, width): 1, 6, 3, 2 and 6 tiles. Those of six have more patches than three tiles and are
# resized; rows of padding are cut off the second.
SIZES = [(10, 10), (16, 30), (25, 9), (16, 10), (20, 28)]


def published(tiling, params, whole, tiles, size):
    """Tokens of projected grids whole [g, g, D] and tiles [n, g, g, D], as a list."""
    if not tiling.whole:
        grids = [pool_grid(tile, tiling.connector.pool, tiling.connector.stride) for tile in tiles]
        return [token for grid in grids for token in grid.reshape(-1, LANGUAGE)]
    g = tiling.grid
    height, width = best_resolution(size, tiling.connector.resolutions)
    columns = width // SIDE
    grid = np.empty((height // SIDE * g, columns * g, LANGUAGE))
    for i, j in np.ndindex(grid.shape[:2]):
        grid[i, j] = tiles[i // g * columns + j // g, i % g, j % g]
    (top, left), (h, w) = unpadded(size, grid.shape[:2])
    grid = grid[top : top + h, left : left + w]
    shape = packed_size(h, w, tiling.connector.max_tiles, g)
    if shape != (h, w):
        grid = resize(grid, shape)
    rows = [[*row, params["image_newline"]] for row in grid]
    return [*whole.reshape(-1, LANGUAGE), *(token for row in rows for token in row)]


def resize(grid, shape):
    """Bilinear without anti-aliasing, one output at a time."""
    out = np.zeros((*shape, grid.shape[-1]))
    for i, j in np.ndindex(*shape):
        for y, a in _line(i, shape[0], len(grid)):
            for x, b in _line(j, shape[1], grid.shape[1]):
                out[i, j] += a * b * grid[y, x]
    return out


def _line(place, new, old):
    at = max((place + 0.5) * old / new - 0.5, 0.0)
    low = min(int(at), old - 1)
    return (low, 1 - at % 1), (min(low + 1, old - 1), at % 1)


def arrays(tiling, size):
    """(index, weight) filled up to the room of the bucket, and how many tokens are there."""
    index, weight = tiling.tokens(size, ROOM)
    missing = ((0, tiling.num_tokens(ROOM) - len(index)), (0, 0))
    return np.pad(index, missing), np.pad(weight, missing), len(index)


@pytest.mark.parametrize("tiling", TILINGS, ids=["newlines", "unires"])
def test_images_of_any_size_share_a_program(tiling):
    make = functools.partial(make_connector, tiling.connector, WIDTH, LANGUAGE)
    connector, rng = oracle.random_module(make), np.random.default_rng(0)
    params, g = oracle.params_of(connector), tiling.grid
    assert tiling.terms == 4

    def draw(frames):
        patches = rng.normal(size=(len(SIZES), frames, g, g, WIDTH)).astype(np.float32)
        return VisionFeatures(jnp.asarray(patches), jnp.asarray(patches))

    whole, tiles = draw(1), draw(ROOM)
    made = [arrays(tiling, size) for size in SIZES]
    index, weight = (np.stack([row[i] for row in made]) for i in (0, 1))
    found = jax.jit(connector.tiles)(whole, tiles, index, weight)
    for row, size in enumerate(SIZES):
        grids = [project(params, features.patches[row]) for features in (whole, tiles)]
        number = tiling.tiles(size)
        expected = published(tiling, params, grids[0][0], grids[1][:number], size)
        assert made[row][2] == len(expected)
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-5)
    assert [tiling.tiles(size) for size in SIZES] == [1, 6, 3, 2, 6]


@pytest.mark.parametrize("tiling", TILINGS, ids=["newlines", "unires"])
def test_the_room_is_that_of_the_image_with_most_tokens(tiling):
    sizes = [(h, w) for h in range(1, 40, 2) for w in range(1, 40, 2)]
    lengths = [len(tiling.tokens(size, ROOM)[0]) for size in sizes if tiling.tiles(size) <= ROOM]
    assert max(lengths) == tiling.num_tokens(ROOM)


def test_published_numbers():
    """27 x 27 patches of SigLIP, at most nine tiles' worth; 12 x 12 of CLIP and 49 tiles."""
    onevision, longva = (tiling_of(preset(f"{name}_7b")) for name in ("llava_onevision", "longva"))
    assert (onevision.most_tiles(), longva.most_tiles()) == (36, 49)
    assert len(onevision.tokens((384, 384), 36)[0]) == 729 + 27 * 28
    assert len(onevision.tokens((1152, 1152), 36)[0]) == 729 + 81 * 82
    assert longva.num_tokens(49) == len(longva.tokens((2352, 2352), 49)[0]) == 7_056
    assert len(visual_frames(preset("longva_7b"), 1, 4)) == 4 * 144


def test_models_without_tiles():
    for name in ("video_llava_7b", "videochat2_7b", "siglip2_qwen3_8b", "micro"):
        assert tiling_of(preset(name)) is None
    with pytest.raises(UserError, match="tiles: 3, but the model's connector sees images as one"):
        visual_frames(preset("video_llava_7b"), 1, 3)
    with pytest.raises(UserError, match="tiles: 1, but images of the model have 2 or more"):
        Tiling(MlpConnectorConfig(
            pool="average", newline="no_token", image="pool", resolutions=((10, 20),)
        ), SIDE, 5).num_tokens(1)  # fmt: skip
