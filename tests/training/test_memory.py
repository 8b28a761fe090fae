"""Bytes of traced programs against counts by hand."""

import jax
import jax.numpy as jnp

from tpo_jax.training.memory import Split, peak_bytes, product_bytes

KIB = 1024


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(function, *args):
    return jax.make_jaxpr(function)(*args)


def test_elementwise_results_take_the_place_of_operands():
    x = spec(KIB)
    assert peak_bytes(trace(lambda x: jnp.exp(jnp.sin(x * 2)), x)) == 4 * KIB
    # Both are read by the last one.
    assert peak_bytes(trace(lambda x: (a := jnp.sin(x)) + jnp.exp(jnp.cos(a)), x)) == 8 * KIB


def test_products_and_what_nobody_reads():
    x = spec(16, 16)

    def run(x):
        jnp.ones((KIB, KIB)) @ jnp.ones((KIB, KIB))
        return (x @ x) @ x

    assert peak_bytes(trace(run, x)) == 2 * 16 * 16 * 4
    assert product_bytes(trace(run, x)) == 6 * 16 * 16 * 4


def test_a_loop_stacks_what_the_backward_pass_needs_and_remat_does_not():
    def loss(remat):
        def layer(x, k):
            return jnp.tanh(jnp.tanh(x @ k) @ k), None

        body = jax.checkpoint(layer) if remat else layer
        return lambda x, ks: jax.lax.scan(body, x, ks)[0].sum()

    args = spec(KIB, 8), spec(10, 8, 8)
    peaks = {r: peak_bytes(trace(jax.grad(loss(r)), *args)) for r in (False, True)}
    stack = 10 * KIB * 8 * 4  # one activation of each layer
    assert stack < peaks[True] < 1.6 * stack
    assert peaks[False] > 1.9 * stack


def test_what_is_shaped_like_a_parameter_is_split_like_it():
    ks = spec(10, 64, 64)
    gradient = trace(jax.grad(lambda ks: jnp.square(ks).sum()), ks)
    assert peak_bytes(gradient, Split({(10, 64, 64): 4})) == peak_bytes(gradient) / 4
