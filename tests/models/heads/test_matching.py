import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tpo_jax.models.heads.matching import match

solve = jax.jit(match)


def scipy_match(cost, valid):
    """The columns of the valid rows, by SciPy on those rows alone, -1 elsewhere."""
    found = np.full(len(cost), -1)
    rows = np.flatnonzero(valid)
    if len(rows):
        found[rows] = scipy.optimize.linear_sum_assignment(cost[rows])[1]
    return found


def costs(kind, number, rows, columns):
    rng = np.random.default_rng(rows * 100 + columns)
    shape = (number, rows, columns)
    if kind == "uniform":
        return rng.uniform(-3, 3, shape).astype(np.float32)
    high = {"ties": 3, "constant": 1, "few ties": 12}[kind]
    return rng.integers(0, high, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["uniform", "ties", "constant", "few ties"])
def test_equals_scipy_with_ties_and_padded_rows(kind):
    cost = costs(kind, 300, 5, 10)
    valid = np.random.default_rng(1).random(cost.shape[:2]) < 0.7
    valid[:100] = True
    valid[100] = False
    found = np.asarray(solve(cost, valid))
    for one, ok, got in zip(cost, valid, found, strict=True):
        np.testing.assert_array_equal(got, scipy_match(one, ok))


def test_as_many_rows_as_columns_and_leading_axes():
    """A square with ties moves the most rows; also: it is no way for a gradient."""
    cost = costs("ties", 300, 6, 6).reshape(3, 100, 6, 6)
    valid = np.ones((3, 100, 6), bool)

    @jax.jit
    def total(cost):
        found = match(cost, valid)
        chosen = jnp.take_along_axis(cost, found[..., None], axis=-1)
        return jnp.sum(chosen), found

    gradient, found = jax.grad(total, has_aux=True)(cost)
    assert found.shape == (3, 100, 6) and found.dtype == jnp.int32
    expected = [scipy.optimize.linear_sum_assignment(one)[1] for one in cost.reshape(-1, 6, 6)]
    np.testing.assert_array_equal(found.reshape(-1, 6), expected)
    np.testing.assert_array_equal(np.asarray(gradient).sum(-1), valid)


def test_what_stands_in_padding_is_not_read():
    cost = costs("uniform", 300, 5, 10)
    valid = np.broadcast_to(np.arange(5) < 3, (300, 5))
    expected = solve(cost, valid)
    cost[:, 3:] = np.nan
    np.testing.assert_array_equal(solve(cost, valid), expected)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf, 3e38])
def test_costs_that_are_not_finite_end_the_search_with_an_assignment(spoilt):
    """A diverged step has them; without an end no guard against divergence is reached."""
    cost = costs("uniform", 300, 5, 10)
    expected = solve(cost, np.ones((300, 5), bool))
    cost[:100, 1] = spoilt
    cost[100:200, :, 4] = spoilt
    found = np.asarray(solve(cost, np.ones((300, 5), bool)))
    np.testing.assert_array_equal(found[200:], expected[200:])
    assert all(len(set(row)) == 5 and min(row) >= 0 for row in found)


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="11 rows for 10 columns.*buckets.*windows"):
        match(jnp.zeros((11, 10)), jnp.ones(11, bool))
