import numpy as np
import pytest

from tpo_jax.models.towers.interpolate import resize_grid, resize_matrix, resize_positions


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new, old", [(3, 7), (7, 3), (5, 5), (14, 27), (1, 4)])
def test_a_constant_stays_and_the_same_size_changes_nothing(kernel, antialias, new, old):
    matrix = resize_matrix(new, old, kernel, antialias=antialias)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)  # mirror image
    if new == old:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)


def test_linear_is_the_two_neighbours_of_the_centre():
    # 27 -> 14: output 1 is centred at 1.5 * 27 / 14 - 0.5 = 2.39286.
    row = resize_matrix(14, 27)[1]
    np.testing.assert_allclose(row[[2, 3]], [1 - 0.392857, 0.392857], atol=1e-6)
    assert np.count_nonzero(row) == 2


def test_a_grid_is_resized_along_both_axes():
    x = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4, 1)
    out = np.asarray(resize_grid(x, (2, 2)))[0, :, :, 0]
    rows, columns = resize_matrix(2, 3), resize_matrix(2, 4)
    np.testing.assert_allclose(out, rows @ x[0, :, :, 0] @ columns.T, atol=1e-6)


def test_a_table_of_its_own_grid_is_used_as_it_is():
    table = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    assert resize_positions(table, (3, 3), "cubic") is table
    assert resize_positions(table, (2, 5), "cubic").shape == (10, 2)
