"""Attention behind one function, and its two-part form for branches that share a prefix.

Visibility is by index and segment: key j is visible to query i iff j <= i + causal_offset and both
carry the same segment id. A prefix attends to itself with offset 0; a branch attends to
[prefix || itself] with offset P. Padding is segment 0 on both sides: a padded query sees padded
keys, itself included, so that no row of the softmax is ever empty.

Backends: "xla" (everywhere), "cudnn" (NVIDIA, 16-bit), "splash" (TPU Pallas kernel, which never
materialises logits), "splash_interpret" (the same kernel, slowly, on any device).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

BACKENDS = ("xla", "cudnn", "splash", "splash_interpret")
# Finite, so that a row without any visible key gives a uniform average instead of NaN.
MASKED = -1e9
_SPLASH_BLOCK = 128


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    causal_offset: int | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
      q: float[B, T, N, H]; not scaled.
      k, v: float[B, S, G, H] with N a multiple of G.
      q_segments, kv_segments: int32[B, T], int32[B, S], both or neither.
      causal_offset: static offset of the causal rule; None lets every query see every key.
      backend: one of BACKENDS.

    Returns: float[B, T, N, H] in the dtype of q.
    """
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: q_segments and kv_segments must be given together")
    if backend == "xla":
        mask = _mask(q.shape[1], k.shape[1], q_segments, kv_segments, causal_offset)
        logits = _logits(q, k)
        if mask is not None:
            logits = jnp.where(mask, logits, MASKED)
        weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
        return _combine(weights, v)
    if backend == "cudnn":
        mask = _mask(q.shape[1], k.shape[1], q_segments, kv_segments, causal_offset)
        mask = None if mask is None else mask[:, :, 0]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    if backend in ("splash", "splash_interpret"):
        interpret = backend == "splash_interpret"
        return _splash(q, k, v, q_segments, kv_segments, causal_offset, interpret)
    raise ValueError(f"attention: backend {backend!r} is unknown; use one of {BACKENDS}")


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
    backend: str = "xla",
) -> jax.Array:
    """K branches of a row attend to the row's prefix and each to itself.

    Args:
      q: float[B, K, T, N, H].
      prefix_k, prefix_v: float[B, P, G, H], shared by the K branches.
      own_k, own_v: float[B, K, S, G, H].
      q_segments: int32[B, K, T]; prefix_segments: int32[B, P]; own_segments: int32[B, K, S].
      own_offset: own key j is visible to query t iff j <= t + own_offset. A traced value (the
        write position of a generation cache) always takes the xla path.

    Returns: float[B, K, T, N, H].
    """
    if backend == "xla" or not isinstance(own_offset, int):
        return _two_part_attention(
            q, prefix_k, prefix_v, own_k, own_v, q_segments, prefix_segments, own_segments,
            own_offset,
        )
    B, K, T = q.shape[:3]
    P = prefix_k.shape[1]

    def fold(x):
        return x.reshape(B * K, *x.shape[2:])

    def joined(prefix, own):
        return jnp.concatenate([jnp.repeat(prefix, K, axis=0), fold(own)], axis=1)

    out = attention(
        fold(q), joined(prefix_k, own_k), joined(prefix_v, own_v),
        q_segments=fold(q_segments), kv_segments=joined(prefix_segments, own_segments),
        causal_offset=P + own_offset, backend=backend,
    )  # fmt: skip
    return out.reshape(q.shape)


def _two_part_attention(
    q, prefix_k, prefix_v, own_k, own_v, q_segments, prefix_segments, own_segments, own_offset
):
    """One softmax over prefix and own logits; the prefix is never repeated K times."""
    B, K, T, N, H = q.shape
    P, S = prefix_k.shape[1], own_k.shape[2]
    G = prefix_k.shape[2]

    def fold(x):
        return x.reshape(B * K, *x.shape[2:])

    # All K * T queries of a row are one long query axis against its prefix: [B, G, N/G, K*T, P].
    rows = q.reshape(B, K * T, N, H)
    to_prefix = _logits(rows, prefix_k)
    visible = _mask(K * T, P, q_segments.reshape(B, K * T), prefix_segments, None)
    to_prefix = jnp.where(visible, to_prefix, MASKED)
    to_own = _logits(fold(q), fold(own_k))
    visible = _mask(T, S, fold(q_segments), fold(own_segments), own_offset)
    to_own = jnp.where(visible, to_own, MASKED)
    # [B*K, G, N/G, T, S] -> [B, G, N/G, K*T, S], the layout of the prefix part.
    to_own = to_own.reshape(B, K, G, N // G, T, S).transpose(0, 2, 3, 1, 4, 5)
    to_own = to_own.reshape(B, G, N // G, K * T, S)
    weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_own], axis=-1), axis=-1)
    weights = weights.astype(q.dtype)
    from_prefix = _combine(weights[..., :P], prefix_v).reshape(q.shape)
    own_weights = weights[..., P:].reshape(B, G, N // G, K, T, S).transpose(0, 3, 1, 2, 4, 5)
    from_own = _combine(own_weights.reshape(B * K, G, N // G, T, S), fold(own_v))
    return from_prefix + from_own.reshape(q.shape)


def _logits(q: jax.Array, k: jax.Array) -> jax.Array:
    """float[B, T, N, H], float[B, S, G, H] -> scaled float32[B, G, N/G, T, S]."""
    B, T, N, H = q.shape
    G = k.shape[2]
    # A Python float keeps bfloat16 queries bfloat16.
    q = (q * float(H) ** -0.5).reshape(B, T, G, N // G, H)
    return jnp.einsum("btgnh,bsgh->bgnts", q, k, preferred_element_type=jnp.float32)


def _combine(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float[B, G, N/G, T, S], float[B, S, G, H] -> float[B, T, N, H]."""
    out = jnp.einsum("bgnts,bsgh->btgnh", weights, v)
    B, T, G, n, H = out.shape
    return out.reshape(B, T, G * n, H)


def _mask(T, S, q_segments, kv_segments, causal_offset) -> jax.Array | None:
    """bool broadcastable to [B, 1, 1, T, S]; None where everything is visible."""
    mask = None
    if causal_offset is not None:
        mask = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + causal_offset
        mask = mask[None, None, None]
    if q_segments is not None:
        same = q_segments[:, :, None] == kv_segments[:, None, :]
        mask = same[:, None, None] if mask is None else mask & same[:, None, None]
    return mask


def _splash(q, k, v, q_segments, kv_segments, causal_offset, interpret: bool) -> jax.Array:
    """The Pallas kernel, per example and vmapped; lengths padded to whole blocks."""
    B, T, N, H = q.shape
    S = k.shape[1]
    padded_t, padded_s = (-(-size // _SPLASH_BLOCK) * _SPLASH_BLOCK for size in (T, S))
    if q_segments is None:
        q_segments, kv_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)

    def lengthen(x, size):
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    def heads_first(x, size):
        return lengthen(x, size).transpose(0, 2, 1, 3)

    # Filling uses segment -1, which nothing real carries; its rows are cut off again.
    segments = splash_attention_kernel.SegmentIds(
        q=lengthen(q_segments + 1, padded_t) - 1, kv=lengthen(kv_segments + 1, padded_s) - 1
    )
    kernel = _splash_kernel(padded_t, padded_s, N, causal_offset, interpret)
    q = heads_first(q * float(H) ** -0.5, padded_t)
    out = jax.vmap(kernel)(q, heads_first(k, padded_s), heads_first(v, padded_s), segments)
    return out.transpose(0, 2, 1, 3)[:, :T]


def _splash_kernel(T: int, S: int, heads: int, causal_offset: int | None, interpret: bool):
    masks = splash_attention_mask
    if causal_offset is None:
        mask = masks.FullMask((T, S))
    else:
        mask = masks.CausalMask((T, S), offset=causal_offset)
    return splash_attention_kernel.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )
