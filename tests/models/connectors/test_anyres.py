import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.connectors.anyres import best_resolution, pack_tiles, packed_tokens, unpadded

GRID = [(384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)]


@pytest.mark.parametrize("size, expected", [
    ((300, 300), (384, 384)), ((400, 300), (768, 384)), ((1000, 400), (1152, 768)),
    ((2000, 2000), (2304, 2304)), ((200, 900), (384, 1152)),
])  # fmt: skip
def test_the_resolution_that_keeps_most(size, expected):
    assert best_resolution(size, GRID) == expected


def test_what_is_left_without_padding():
    assert unpadded((100, 200), (54, 54)) == ((13, 0), (28, 54))
    assert unpadded((200, 100), (54, 54)) == ((0, 13), (54, 28))
    assert unpadded((50, 50), (54, 54)) == ((0, 0), (54, 54))


def _tiles(rows, columns, g=3, D=2):
    rng = np.random.default_rng(0)
    return rng.normal(size=(1 + rows * columns, g * g, D)).astype(np.float32)


def test_tiles_become_one_grid_with_a_newline_after_every_row():
    tiles, newline = _tiles(2, 3), np.array([9.0, -9.0], np.float32)
    size, resolutions = (16, 30), [(20, 30)]  # 20 x 30 pixels in tiles of 10; 2 rows are padding
    packed = pack_tiles(jnp.asarray(tiles), jnp.asarray(newline), size, resolutions, 10, 9)
    found = np.asarray(packed)
    grid = np.empty((6, 9, 2))
    for i, j in np.ndindex(6, 9):
        grid[i, j] = tiles[1 + (i // 3) * 3 + j // 3, (i % 3) * 3 + j % 3]
    # 16 of 20 pixel rows are 4.8 of 6 patch rows: one row of patches is cut off above and below.
    rows = [np.concatenate([row, newline[None]]) for row in grid[1:5]]
    np.testing.assert_array_equal(found[:9], tiles[0])
    np.testing.assert_array_equal(found[9:], np.concatenate(rows))
    assert len(found) == packed_tokens(size, resolutions, 10, 9, 3) == 9 + 4 * 10


def test_too_many_patches_are_resized():
    tiles = jnp.asarray(np.ones((10, 9, 2), np.float32))
    found = pack_tiles(tiles, jnp.zeros(2), (30, 30), [(30, 30)], 10, max_tiles=4)
    side = int(9 // np.sqrt(81 / 36))
    assert len(found) == packed_tokens((30, 30), [(30, 30)], 10, 4, 3) == 9 + side * (side + 1)
    np.testing.assert_allclose(found.reshape(-1, 2)[9 : 9 + side], 1.0, atol=1e-6)


def test_another_number_of_tiles_is_refused():
    with pytest.raises(ValueError, match=r"16 x 30 pixels: 3 tiles.*1 \+ 2 x 3"):
        pack_tiles(jnp.ones((3, 9, 2)), jnp.ones(2), (16, 30), [(20, 30)], 10, 9)
