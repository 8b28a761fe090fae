"""Where and how the optimizer's moments are stored between two steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

HOST = "pinned_host"


class Rounded(NamedTuple):
    """State of `in_bfloat16`: int32[], steps done, and the rule's state."""

    count: jax.Array
    moments: Any


def in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, computed in float32, whose floating state is stored in bfloat16.

    Moments are rounded at random, up as often as they are near to the number above, so that they
    are right on average. To the nearest, a moment would stand still when a step changes it by less
    than half of its last bit: Adam's second one at b2=0.999 when it has a quarter of its way behind
    it, and it would never fall again.
    """

    def init(params: Any) -> Rounded:
        zero = jnp.zeros((), jnp.int32)
        return Rounded(zero, _map_floats(lambda x: x.astype(jnp.bfloat16), rule.init(params)))

    def update(updates: Any, state: Rounded, params: Any = None) -> tuple[Any, Rounded]:
        before = _map_floats(lambda x: x.astype(jnp.float32), state.moments)
        updates, after = rule.update(updates, before, params)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        leaves, structure = jax.tree.flatten(after)
        stored = [
            round_at_random(x, jax.random.fold_in(key, i)) if _is_float(x) else x
            for i, x in enumerate(leaves)
        ]
        return updates, Rounded(state.count + 1, jax.tree.unflatten(structure, stored))

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32[...] -> bfloat16[...], up or down to a neighbour; on average the number itself."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: what is added carries over as often as it should.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)


def host_shardings(state: Any, shardings: Any) -> Any:
    """The shardings of an optimizer state, floating leaves in the memory of the host."""
    return jax.tree.map(
        lambda x, s: s.with_memory_kind(HOST) if _is_float(x) else s, state, shardings
    )


def to_device(state: Any) -> Any:
    """An optimizer state with all leaves in the memory of the device; inside jit."""
    return _map_floats(lambda x: jax.device_put(x, jax.memory.Space.Device), state)


def is_on_host(leaf: Any) -> bool:
    """Whether a leaf with a sharding takes no memory of the device."""
    return leaf.sharding.memory_kind == HOST


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _map_floats(function: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: function(x) if _is_float(x) else x, tree)
