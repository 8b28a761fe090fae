import pytest

from tpo_jax.models.connectors.anyres import best_resolution, packed_size, unpadded

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


def test_a_grid_of_more_patches_than_nine_tiles_is_resized():
    assert packed_size(81, 81, 9, 27) == (81, 81)
    assert packed_size(162, 81, 9, 27) == (114, 57)
    assert packed_size(88, 88, 9, 27) == (88, 88)  # by less than a tenth
