"""Bytes of traced programs against counts by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

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


def test_an_axis_of_tokens_or_frames_is_split_where_it_is_seen_whole():
    split = Split(lengths={96: 4}, clips={12: 2})
    assert [split.devices(shape) for shape in ((96,), (2, 3, 96), (3, 12, 5, 5), (3, 12, 5))] == [
        4, 4, 2, 1
    ]  # fmt: skip
    x = spec(96, 16)
    run = trace(lambda x: jnp.tanh(x @ jnp.ones((16, 16))) @ jnp.ones((16, 16)), x)
    assert peak_bytes(run, split) < peak_bytes(run) / 2
    # Operands and results of both products: x, a result and a matrix each.
    tokens, matrix = 96 * 16 * 4, 16 * 16 * 4
    assert product_bytes(run) == 2 * (2 * tokens + matrix)
    assert product_bytes(run, split) == 2 * (2 * tokens / 4 + matrix)


def test_in_a_shard_map_a_device_sees_its_part():
    mesh = AbstractMesh((4,), ("context",), axis_types=(AxisType.Auto,))

    def local(x):
        return jax.lax.all_gather(x, "context", tiled=True).sum(keepdims=True)

    run = jax.shard_map(local, mesh=mesh, in_specs=P("context"), out_specs=P("context"))
    whole = peak_bytes(trace(run, spec(KIB)), Split(lengths={KIB: 4}))
    assert 4 * KIB <= whole < 5 * KIB  # what is gathered is there as a whole
