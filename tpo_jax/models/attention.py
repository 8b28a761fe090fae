"""Attention behind one function, and its two-part form for branches that share a prefix.

Visibility is by index and segment: key j is visible to query i iff j <= i + causal_offset and both
carry the same segment id. A prefix attends to itself with offset 0; a branch attends to
[prefix || itself] with offset P. Padding is segment 0 on both sides: a padded query sees padded
keys, itself included, so that no row of the softmax is ever empty.

A sliding window w hides keys that lie w or more tokens back. `attention` counts that distance by
index. Branches count it by position, because padding may stand between a prefix and its branches;
the kernels count by index in prefixes whose padding is moved to the front.

Backends: "xla" (everywhere), "cudnn" (NVIDIA, 16-bit), "splash" (TPU Pallas kernel, which never
materialises logits), "splash_interpret" (the same kernel, slowly, on any device).

On a mesh whose axis `context` is larger than 1, a prefix is split over it (parallel.context). Its
queries stay where they are and its keys and values are gathered, layer by layer: with few key/value
heads they are small (of Qwen2-7B in bfloat16 2 KiB a token and layer, against 7 KiB of queries).
Branches go to the keys: every device attends to its part of the prefix, and the parts of the one
softmax are added up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpo_jax.models.splash_mask import CausalMask
from tpo_jax.parallel.context import AXIS, ContextLayout, context_devices, per_device, split_tokens
from tpo_jax.parallel.mesh import BATCH_AXES

BACKENDS = ("xla", "cudnn", "splash", "splash_interpret")
# Finite, so that a row without any visible key gives a uniform average instead of NaN.
MASKED = -1e9
SPLASH_BLOCK = 128
# Queries of a split prefix that are taken at a time: the logits of one block exist at once.
_CONTEXT_BLOCK = 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal_offset: int | None = None,
    window: int | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
      q: float[B, T, N, H]; not scaled.
      k, v: float[B, S, G, H] with N a multiple of G.
      q_segments, kv_segments: int32[B, T], int32[B, S], both or neither.
      causal_offset: static offset of the causal rule; None lets every query see every key.
      window: key j is visible to query i only if j > i + causal_offset - window; static.
      backend: one of BACKENDS.

    Returns: float[B, T, N, H] in the dtype of q.
    """
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: q_segments and kv_segments must be given together")
    if window is not None and causal_offset is None:
        raise ValueError(f"attention: window={window} needs a causal_offset")
    if q_segments is None and causal_offset is not None:
        q_segments, kv_segments = (jnp.ones(x.shape[:2], jnp.int32) for x in (q, k))
    if backend == "xla":
        logits = _logits(q, k)
        mask = _mask(q.shape[1], causal_offset, q_segments, kv_segments, window)
        if mask is not None:
            logits = jnp.where(mask, logits, MASKED)
        return _combine(jax.nn.softmax(logits, axis=-1).astype(q.dtype), v)
    if backend == "cudnn":
        mask = _mask(q.shape[1], causal_offset, q_segments, kv_segments, window)
        mask = None if mask is None else mask[:, :, :, 0]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    if backend in ("splash", "splash_interpret"):
        interpret = backend == "splash_interpret"
        return _splash(q, k, v, q_segments, kv_segments, causal_offset, window, interpret)
    raise ValueError(f"attention: backend {backend!r} is unknown; use one of {BACKENDS}")


def prefix_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    layout: ContextLayout,
    *,
    window: int | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Prefixes attend to themselves, causally, their tokens placed by `layout`.

    With "xla" a device holds float32[B, N, 256, P] logits at a time, with "splash" none; both hold
    the gathered keys and values of one layer.

    Args:
      q: float[B, P', N, H]; k, v: float[B, P', G, H]; segments: int32[B, P'].
      window: see `attention`.

    Returns: float[B, P', N, H], placed as q.
    """
    if layout.devices == 1:
        return attention(
            q, k, v, q_segments=segments, kv_segments=segments, causal_offset=0, window=window,
            backend=backend,
        )  # fmt: skip
    if backend == "xla":
        place = P(None, AXIS)

        def local(q, k, v, segments, order):
            k, v, kv_segments = (layout.gather(x) for x in (k, v, segments))
            return _in_blocks(q, k, v, segments, kv_segments, order, window)

        args = (q, k, v, segments, jnp.asarray(layout.order))
        return per_device(local, args, (place,) * 4 + (P(AXIS),), place)
    if backend in ("splash", "splash_interpret"):
        return _context_splash(q, k, v, segments, layout, window, backend == "splash_interpret")
    raise ValueError(
        f"attention: backend {backend!r} cannot split a row over mesh.context={layout.devices}; "
        "set mesh.context=1, or give the model language.attention 'xla' or 'splash'"
    )


def branch_attention(
    q: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    *,
    q_segments: jax.Array,
    prefix_segments: jax.Array,
    own_segments: jax.Array,
    own_offset: int | jax.Array = 0,
    window: int | None = None,
    positions: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    backend: str = "xla",
) -> jax.Array:
    """K branches of a row attend to the row's prefix and each to itself.

    The order of the prefix does not matter. Where it is split over `context` the xla path is taken
    whatever the backend: its logits are float32[B, N, K * T, P / C] on a device.

    Args:
      q: float[B, K, T, N, H].
      prefix_k, prefix_v: float[B, P, G, H], shared by the K branches.
      own_k, own_v: float[B, K, S, G, H].
      q_segments: int32[B, K, T]; prefix_segments: int32[B, P]; own_segments: int32[B, K, S].
      own_offset: own key j is visible to query t iff j <= t + own_offset. A traced value (the
        write position of a generation cache) always takes the xla path.

    Returns: float[B, K, T, N, H].
    """
    if (window is None) != (positions is None):
        raise ValueError("branch_attention: window and positions must be given together")
    if backend == "xla" or not isinstance(own_offset, int) or context_devices() > 1:
        return _two_part_attention(
            q, prefix_k, prefix_v, own_k, own_v, q_segments, prefix_segments, own_segments,
            own_offset, window, positions,
        )  # fmt: skip
    B, K, T = q.shape[:3]
    P = prefix_k.shape[1]
    if window is not None:
        prefix_k, prefix_v, prefix_segments = _padding_first(prefix_k, prefix_v, prefix_segments)

    def fold(x):
        return x.reshape(B * K, *x.shape[2:])

    def joined(prefix, own):
        return jnp.concatenate([jnp.repeat(prefix, K, axis=0), fold(own)], axis=1)

    out = attention(
        fold(q), joined(prefix_k, own_k), joined(prefix_v, own_v),
        q_segments=fold(q_segments), kv_segments=joined(prefix_segments, own_segments),
        causal_offset=P + own_offset, window=window, backend=backend,
    )  # fmt: skip
    return out.reshape(q.shape)


def _padding_first(k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
    """[B, P, ...] with the padding behind each row's last token moved before its first."""
    P = segments.shape[1]
    real = segments > 0
    last = jnp.max(jnp.where(real, jnp.arange(P) + 1, 0), axis=1)
    order = (jnp.arange(P) + last[:, None]) % P
    k, v = (jnp.take_along_axis(x, order[..., None, None], axis=1) for x in (k, v))
    return k, v, jnp.take_along_axis(segments, order, axis=1)


def _two_part_attention(
    q, prefix_k, prefix_v, own_k, own_v, q_segments, prefix_segments, own_segments, own_offset,
    window, positions,
):  # fmt: skip
    """One softmax over prefix and own logits; the prefix is never repeated K times."""
    B, K, T, N, H = q.shape
    # Logits are split as these are; the compiler reduces over `context` where it sums over tokens.
    prefix_k, prefix_v, prefix_segments = (
        split_tokens(x, axis=1) for x in (prefix_k, prefix_v, prefix_segments)
    )

    def fold(x):
        return x.reshape(B * K, *x.shape[2:])

    # All K * T queries of a row are one long query axis against its prefix.
    rows_mask = _mask(K * T, None, q_segments.reshape(B, K * T), prefix_segments)
    own_mask = _mask(T, own_offset, fold(q_segments), fold(own_segments))
    if window is not None:
        q_positions, prefix_positions, own_positions = positions
        rows_mask &= _near(q_positions.reshape(B, K * T), prefix_positions, window)
        own_mask &= _near(fold(q_positions), fold(own_positions), window)
    to_prefix = jnp.where(rows_mask, _logits(q.reshape(B, K * T, N, H), prefix_k), MASKED)
    to_own = jnp.where(own_mask, _logits(fold(q), fold(own_k)), MASKED)

    def per_query(x):
        """[B, G, K*T, n, 1] <- [B*K, G, T, n, 1], the order of the prefix part."""
        x = x.reshape(B, K, *x.shape[1:])
        return jnp.swapaxes(x, 1, 2).reshape(B, x.shape[2], K * T, *x.shape[4:])

    def per_branch(x):
        """The inverse of per_query."""
        x = x.reshape(B, x.shape[1], K, T, *x.shape[3:])
        return fold(jnp.swapaxes(x, 1, 2))

    # The shift cancels in the quotient, so no gradient goes through it.
    peak = jnp.maximum(
        jnp.max(to_prefix, axis=-1, keepdims=True),
        per_query(jnp.max(to_own, axis=-1, keepdims=True)),
    )
    peak = jax.lax.stop_gradient(peak)
    to_prefix, to_own = jnp.exp(to_prefix - peak), jnp.exp(to_own - per_branch(peak))
    mass = jnp.sum(to_prefix, -1, keepdims=True) + per_query(jnp.sum(to_own, -1, keepdims=True))
    from_prefix = _combine(to_prefix.astype(q.dtype), prefix_v).reshape(q.shape)
    from_own = _combine(to_own.astype(q.dtype), fold(own_v)).reshape(q.shape)
    # [B, G, K*T, n, 1] -> [B, K, T, N, 1]
    mass = jnp.swapaxes(mass, 1, 2).reshape(B, K, T, N, 1)
    total = from_prefix.astype(jnp.float32) + from_own.astype(jnp.float32)
    return (total / mass).astype(q.dtype)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """float[B, T, N, H], float[B, S, G, H] -> scaled float32[B, G, T, N/G, S].

    The axes stay in the order in which a matrix product leaves them: no transpose of the logits.
    """
    B, T, N, H = q.shape
    G = k.shape[2]
    # A Python float keeps bfloat16 queries bfloat16.
    q = (q * float(H) ** -0.5).reshape(B, T, G, N // G, H)
    return jax.lax.dot_general(
        q, k, (((4,), (3,)), ((0, 2), (0, 2))), preferred_element_type=jnp.float32
    )


def _combine(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float[B, G, T, N/G, S], float[B, S, G, H] -> float[B, T, N, H]."""
    B, G, T, n, _ = weights.shape
    out = jax.lax.dot_general(weights, v, (((4,), (1,)), ((0, 1), (0, 2))))
    return jnp.swapaxes(out, 1, 2).reshape(B, T, G * n, -1)


def _near(q_positions: jax.Array, kv_positions: jax.Array, window: int) -> jax.Array:
    """int32[B, T], int32[B, S] -> bool[B, 1, T, 1, S], by position."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    return (distance < window)[:, None, :, None, :]


def _in_blocks(q, k, v, q_segments, kv_segments, order, window) -> jax.Array:
    """The xla path for queries that are tokens `order` int32[T] of the keys' sequence; the logits
    of a block of queries exist at a time, in the backward pass too."""
    T, size = q.shape[1], min(_CONTEXT_BLOCK, q.shape[1])
    count = -(-T // size)

    def cut(x, axis):
        """The blocks of `axis`, counted along a new first axis; the last is filled up."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - T)
        x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def one(block):
        q, segments, order = block
        # What stands in for arange(T) + causal_offset of the rule.
        mask = _mask(size, order - jnp.arange(size), segments, kv_segments, window)
        logits = jnp.where(mask, _logits(q, k), MASKED)
        return _combine(jax.nn.softmax(logits, axis=-1).astype(q.dtype), v)

    blocks = jax.lax.map(one, (cut(q, 1), cut(q_segments, 1), cut(order, 0)))
    return jnp.moveaxis(blocks, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])[:, :T]


def _mask(T: int, causal_offset, q_segments, kv_segments, window=None) -> jax.Array | None:
    """bool broadcastable to [B, 1, T, 1, S]; None where everything is visible.

    causal_offset: int, int32[] or, where every query has its own, int32[T].
    """
    if q_segments is None:
        return None
    mask = q_segments[:, None, :, None, None] == kv_segments[:, None, None, None, :]
    if causal_offset is None:
        return mask
    keys = jnp.arange(kv_segments.shape[1])
    last = (jnp.arange(T) + causal_offset)[:, None, None]
    mask &= keys <= last
    return mask if window is None else mask & (keys > last - window)


def _splash(
    q, k, v, q_segments, kv_segments, causal_offset, window, interpret: bool
) -> jax.Array:
    """The Pallas kernel, per example and vmapped; lengths padded to whole blocks."""
    B, T, N, H = q.shape
    S = k.shape[1]
    padded_t, padded_s = (-(-size // SPLASH_BLOCK) * SPLASH_BLOCK for size in (T, S))
    if q_segments is None:
        q_segments, kv_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)

    def lengthen(x, size):
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    def heads_first(x, size):
        return lengthen(x, size).transpose(0, 2, 1, 3)

    q = heads_first(q * float(H) ** -0.5, padded_t)
    k, v = heads_first(k, padded_s), heads_first(v, padded_s)
    # Filling uses segment -1, which nothing real carries; its rows are cut off again.
    q_segments = lengthen(q_segments + 1, padded_t) - 1
    kv_segments = lengthen(kv_segments + 1, padded_s) - 1

    def local(q, k, v, q_segments, kv_segments):
        kernel = _splash_kernel(padded_t, padded_s, q.shape[1], causal_offset, window, interpret)
        segments = splash_attention_kernel.SegmentIds(q=q_segments, kv=kv_segments)
        return jax.vmap(kernel)(q, k, v, segments)

    out = _per_device(local, k.shape[1])(q, k, v, q_segments, kv_segments)
    return out.transpose(0, 2, 1, 3)[:, :T]


def _context_splash(
    q, k, v, segments, layout: ContextLayout, window, interpret: bool
) -> jax.Array:
    """`_splash` of a placed prefix: each device's queries against all keys."""
    mesh = jax.sharding.get_abstract_mesh()
    T, S = layout.length // layout.devices, layout.length
    more_t, more_s = -T % SPLASH_BLOCK, -S % SPLASH_BLOCK
    # A query that fills up a block repeats the last one, so that it sees something.
    order = np.pad(layout.order.reshape(-1, T), ((0, 0), (0, more_t)), mode="edge").ravel()
    rows, heads = P(BATCH_AXES, AXIS), _head_axis(mesh, k.shape[2])
    array = P(*rows, heads)

    def local(kernel, q, k, v, segments):
        k, v, kv_segments = (layout.gather(x) for x in (k, v, segments))
        pad_t, pad_s = (((0, 0), (0, more)) for more in (more_t, more_s))
        q = jnp.pad(q * float(q.shape[-1]) ** -0.5, (*pad_t, (0, 0), (0, 0)))
        k, v = (jnp.pad(x, (*pad_s, (0, 0), (0, 0))) for x in (k, v))
        ids = splash_attention_kernel.SegmentIds(
            q=jnp.pad(segments, pad_t, mode="edge"),
            kv=jnp.pad(kv_segments, pad_s, constant_values=-1),
        )
        out = jax.vmap(kernel)(*(x.transpose(0, 2, 1, 3) for x in (q, k, v)), ids)
        return out.transpose(0, 2, 1, 3)[:, :T]

    parts = 1 if heads is None else mesh.shape[heads]
    kernel = _splash_kernel(
        len(order), S + more_s, q.shape[2] // parts, 0, window, interpret, order, layout.devices
    )
    places = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, AXIS)))
    return jax.shard_map(
        local, in_specs=(places, array, array, array, rows), out_specs=array, check_vma=False
    )(kernel, q, k, v, segments)


def _per_device(function, kv_heads: int):
    """`function` on each device's rows and heads: the compiler cannot split a kernel by itself.

    Rows are split over (data, fsdp). Heads are split over `tensor` where the key/value heads
    divide; else every device of that axis computes all of them. Nothing happens outside a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    heads = _head_axis(mesh, kv_heads)
    array, segments = P(BATCH_AXES, heads), P(BATCH_AXES)
    return jax.shard_map(
        function, in_specs=(array, array, array, segments, segments), out_specs=array,
        check_vma=False,
    )  # fmt: skip


def _head_axis(mesh: AbstractMesh, kv_heads: int) -> str | None:
    return "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None


def _splash_kernel(
    T: int, S: int, heads: int, causal_offset: int | None, window: int | None, interpret: bool,
    order: np.ndarray | None = None, devices: int = 1,
):
    """order: int32[T], the token that each query is; devices: over which the queries are split."""
    masks = splash_attention_mask
    if causal_offset is None:
        mask = masks.FullMask((T, S))
    elif window is not None:
        mask = masks.LocalMask((T, S), window_size=(window - 1, 0), offset=causal_offset)
    else:
        mask = CausalMask((T, S), causal_offset)
    if order is not None:
        mask.q_sequence = order
    return splash_attention_kernel.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=devices,
        interpret=interpret,
    )  # fmt: skip
