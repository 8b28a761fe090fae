import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.parallel.weighted_sum import WeightedSum


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_the_mean_does_not_depend_on_the_grouping(cut, seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=10), rng.uniform(0, 1, 10) * (rng.random(10) < 0.7)
    whole = WeightedSum.of(jnp.array(values), jnp.array(weights))
    parts = WeightedSum.of(jnp.array(values[:cut]), jnp.array(weights[:cut])) + WeightedSum.of(
        jnp.array(values[cut:]), jnp.array(weights[cut:])
    )
    np.testing.assert_allclose(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-6)


def test_no_weight_is_zero_with_a_zero_gradient():
    def mean(x):
        return WeightedSum.of(x, jnp.zeros(3)).mean()

    assert mean(jnp.ones(3)) == 0
    np.testing.assert_array_equal(jax.grad(mean)(jnp.ones(3)), np.zeros(3))


def test_entries_without_weight_may_hold_anything():
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert WeightedSum.of(values, jnp.array([1.0, 0.0, 1.0])).mean() == 2.0


def test_weights_broadcast_and_booleans_count_one():
    term = WeightedSum.of(jnp.ones((2, 3)), jnp.array([[True], [False]]))
    assert (term.total, term.weight) == (3.0, 3.0)


def test_it_is_a_pytree():
    doubled = jax.tree.map(lambda x: 2 * x, WeightedSum.of(jnp.ones(2), jnp.ones(2)))
    assert isinstance(doubled, WeightedSum) and doubled.mean() == 1.0
    assert WeightedSum.zero().mean() == 0
