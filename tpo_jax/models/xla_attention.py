"""Attention in plain operations: what the backends "xla" and "dense" run, on any device.

`attend` has its own backward pass (after FlashAttention, 2205.14135): it keeps the logarithm of
each query's sum instead of the weights, computes them again, and takes the gradient of the softmax
from the outputs (the sum of weight * gradient over keys is output . gradient). So the logits of one
call exist at a time, and a row that is cut into calls holds those of one block: of a fourth of its
queries, or of `TURN` in a long row and of branches behind a long prefix. `plain_attend` is the same
function, differentiated by JAX: slower and larger, with products as textbooks count them.

Axes: B batch, T queries, S keys, G key/value heads, N = G * n query heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row without any visible key gives a uniform average instead of NaN.
MASKED = -1e9
# A causal row is cut so that a block has at least this many queries, and into at most so many
# blocks: more save little and take their time to compile.
_BLOCK_QUERIES, _BLOCKS = 128, 4
# The blocks of a row of more queries than `LONG` are taken `TURN` queries at a time, and so are
# branches with more logits than such a row: a fourth of it is too many, and so many queries still
# fill a matrix product.
LONG, TURN = 2048, 256

_product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class Rule(NamedTuple):
    """Key j is visible to query i iff everything that is given says so. Each is (of q, of kv).

    segments: int32[B, T], int32[B, S], equal. order: int32[T], int32[S], j's at most i's.
    positions: int32[B or 1, T], int32[B or 1, S], j's less than a window behind i's.
    """

    segments: tuple[jax.Array, jax.Array] | None = None
    order: tuple[jax.Array, jax.Array] | None = None
    positions: tuple[jax.Array, jax.Array] | None = None

    def visible(self, window: int | None) -> jax.Array | None:
        """bool broadcastable to [B, 1, T, 1, S]; None where everything is visible."""
        parts = []
        if self.segments is not None:
            q, kv = self.segments
            parts.append(q[:, :, None] == kv[:, None, :])
        if self.order is not None:
            q, kv = self.order
            parts.append((kv <= q[:, None])[None])
        if window is not None:
            q, kv = self.positions
            parts.append(q[:, :, None] - kv[:, None, :] < window)
        if not parts:
            return None
        return functools.reduce(jnp.logical_and, parts)[:, None, :, None, :]

    def block(self, queries: slice, keys: slice) -> Rule:
        """The rule of some queries and some keys."""
        return Rule(*(
            None if pair is None else (pair[0][..., queries], pair[1][..., keys]) for pair in self
        ))  # fmt: skip


def plain_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention in float32, with what joins it to attention over other keys.

    Args:
      q: float[B, T, N, H], not scaled; k, v: float[B, S, G, H].

    Returns: (float32[B, T, N, H], log of the sum of exponentiated logits float32[B, G, T, n, 1]).
    """
    logits = _logits(q, k, rule.visible(window))
    # The shift cancels in the quotient, so no gradient goes through it.
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    mass = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product(weights.astype(q.dtype), v, (((4,), (1,)), ((0, 1), (0, 2))))
    return merge_heads(out / mass), peak + jnp.log(mass)


attend = jax.custom_vjp(plain_attend, nondiff_argnums=(4,))


# For the backward pass: q, k, v, the rule, the output and the logarithm of the sum.
_Kept = tuple[jax.Array, jax.Array, jax.Array, Rule, jax.Array, jax.Array]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, window: int | None
) -> tuple[tuple[jax.Array, jax.Array], _Kept]:
    out, log_sum = plain_attend(q, k, v, rule, window)
    return (out, log_sum), (q, k, v, rule, out, log_sum)


def _backward(
    window: int | None, kept: _Kept, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, rule, out, log_sum = kept
    to_out, to_log_sum = gradients
    G, scale = k.shape[2], float(q.shape[-1]) ** -0.5
    mask = rule.visible(window)
    weights = jnp.exp(_logits(q, k, mask) - log_sum)
    # The gradient of logit j is weight j * (that of weight j - this).
    shift = _split_heads(jnp.sum(out * to_out, axis=-1, keepdims=True), G) - to_log_sum
    to_out = _split_heads(to_out.astype(q.dtype), G)
    to_logits = weights * (_product(to_out, v, (((4,), (3,)), ((0, 1), (0, 2)))) - shift)
    if mask is not None:  # Where a query sees nothing, hidden keys have weights that do not move.
        to_logits = jnp.where(mask, to_logits, 0.0)
    to_logits = to_logits.astype(q.dtype)
    to_q = _product(to_logits, k, (((4,), (1,)), ((0, 1), (0, 2)))) * scale
    # Features before keys: the order in which the large arrays need no transpose.
    over_queries = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    to_k = _product(_split_heads(q * scale, G), to_logits, over_queries)
    to_v = _product(to_out, weights.astype(q.dtype), over_queries)
    to_k, to_v = (jnp.transpose(x, (0, 3, 1, 2)).astype(k.dtype) for x in (to_k, to_v))
    return merge_heads(to_q).astype(q.dtype), to_k, to_v, None


attend.defvjp(_forward, _backward)


def in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, causal_offset: int, window: int | None
) -> jax.Array:
    """`attend` of causal queries, i to keys 0 to i + causal_offset: a block of queries at a time
    against the keys up to its end, and in turns where there are many. float32[B, T, N, H]."""
    T, S = q.shape[1], k.shape[1]
    size = -(-T // max(1, min(_BLOCKS, T // _BLOCK_QUERIES)))
    outs = []
    for start in range(0, T, size):
        queries = slice(start, min(start + size, T))
        keys = slice(0, min(max(queries.stop + causal_offset, 1), S))
        block = q[:, queries], k[:, keys], v[:, keys], rule.block(queries, keys)
        outs.append((in_turns if T > LONG else attend)(*block, window)[0])
    return jnp.concatenate(outs, axis=1)


def in_turns_if_long(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """`attend`, in turns where there are more logits than a row of `LONG` tokens has."""
    T, S = q.shape[1], k.shape[1]
    return (in_turns if T > TURN and T * S > LONG**2 else attend)(q, k, v, rule, window)


def in_turns(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """`attend`, `TURN` queries after `TURN` in a loop: float32[B, G, TURN, n, S] logits exist at a
    time, in the backward pass too."""
    T, size = q.shape[1], min(TURN, q.shape[1])
    count = -(-T // size)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        """The turns of `axis`, counted along a new first axis; the last is filled up."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - T)
        x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def joined(x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `cut`."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], count * size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, T, axis=axis)

    # Of each turn keys and values get a gradient; float32 is what these are added up in.
    wide = k.astype(jnp.float32), v.astype(jnp.float32)
    of_queries = [None if pair is None else cut(pair[0], pair[0].ndim - 1) for pair in rule]

    def turn(block: tuple[jax.Array, list[jax.Array | None]]) -> tuple[jax.Array, jax.Array]:
        q, places = block
        pairs = (None if x is None else (x, pair[1]) for x, pair in zip(places, rule, strict=True))
        return attend(q, wide[0].astype(k.dtype), wide[1].astype(v.dtype), Rule(*pairs), window)

    out, log_sum = jax.lax.map(turn, (cut(q, 1), of_queries))
    return joined(out, 1), joined(log_sum, 2)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scaled and masked, float32[B, G, T, n, S].

    The axes stay in the order in which a matrix product leaves them: no transpose of the logits.
    """
    B, T, N, H = q.shape
    G = k.shape[2]
    # A Python float keeps bfloat16 queries bfloat16.
    q = (q * float(H) ** -0.5).reshape(B, T, G, N // G, H)
    logits = _product(q, k, (((4,), (3,)), ((0, 2), (0, 2))))
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _split_heads(x: jax.Array, G: int) -> jax.Array:
    """[B, T, N, H] -> [B, G, T, n, H]."""
    B, T, N, H = x.shape
    return jnp.swapaxes(x.reshape(B, T, G, N // G, H), 1, 2)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, G, T, n, H] -> [B, T, N, H]."""
    B, G, T, n, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B, T, G * n, H)
