"""Layers of SAM 2 alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.heads.sam2.layers import (
    DoublingConv,
    convolved,
    convolved_by_products,
)
from tpo_jax.models.layers import Rngs


@pytest.mark.parametrize(
    ("size", "stride", "padding", "depthwise"),
    [(7, 4, 3, False), (3, 2, 1, False), (2, 2, 0, False), (4, 4, 0, False), (7, 1, 3, True)],
)
def test_both_ways_to_convolve_agree(size, stride, padding, depthwise):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, 12, 8, 6)).astype(np.float32)
    shape = (6, 1) if depthwise else (5, 6)
    kernel = rng.normal(size=(*shape, size, size)).astype(np.float32)

    def value_and_gradients(convolve):
        def loss(x, kernel):
            y = convolve(x, kernel, stride=stride, padding=padding)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    (_, expected), wanted = value_and_gradients(convolved)
    (_, found), gradients = value_and_gradients(convolved_by_products)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-4)


def test_a_doubling_convolution_is_a_transposed_one():
    layer = DoublingConv(3, 5, rngs=Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...])
    expected = np.zeros((2, 8, 12, 5), np.float32)
    for a in range(2):
        for b in range(2):
            expected[:, a::2, b::2] = x @ kernel[:, :, a, b]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-5)
