import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.models.layers import LayerNorm, RMSNorm, dropout, fold_rows, matmul


def test_matmul_and_its_gradients_are_those_of_the_operator():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    kernel = jax.random.normal(jax.random.key(1), (5, 4))

    def total(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel)))

    want = jax.grad(total(jnp.matmul), (0, 1))(x, kernel)
    got = jax.jit(jax.grad(total(matmul), (0, 1)))(x, kernel)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_matmul_gradient_keeps_the_kernel_dtype():
    x, kernel = jnp.ones((2, 3, 5), jnp.bfloat16), jnp.ones((5, 4), jnp.bfloat16)
    gradient = jax.grad(lambda k: jnp.sum(matmul(x, k).astype(jnp.float32)))(kernel)
    assert gradient.dtype == jnp.bfloat16


def test_norms_follow_their_formulas():
    x = jax.random.normal(jax.random.key(0), (4, 6)) * 3.0 + 1.0
    centred = np.asarray(x) - np.asarray(x).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(LayerNorm(6)(x), expected, atol=1e-5)
    expected = np.asarray(x) / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(RMSNorm(6, epsilon=1e-5)(x), expected, atol=1e-5)


def test_dropout_keeps_the_mean_and_each_row_has_its_own_mask():
    keys = jax.random.split(jax.random.key(0), 2)
    out = dropout(jnp.ones((2, 20000)), keys, 0.25)
    np.testing.assert_allclose(np.unique(out), [0.0, 4 / 3], rtol=1e-6)
    np.testing.assert_allclose(out.mean(axis=1), 1.0, atol=0.02)
    assert not np.array_equal(out[0], out[1])


def test_fold_rows_is_fold_in_of_every_row():
    keys = jax.random.split(jax.random.key(3), 4).reshape(2, 2)
    folded = fold_rows(keys, jnp.array([[0, 1], [2, 3]]))
    expected = jax.random.fold_in(keys[1, 0], 2)
    assert jnp.array_equal(jax.random.key_data(folded[1, 0]), jax.random.key_data(expected))
    assert fold_rows(None, 1) is None
