"""Attention behind one function, and its two-part form for branches that share a prefix.

Visibility is by index and segment: key j is visible to query i iff j <= i + causal_offset and both
carry the same segment id. A prefix attends to itself with offset 0; a branch attends to
[prefix || itself] with offset P. Padding is segment 0 on both sides: a padded query sees padded
keys, itself included, so that no row of the softmax is ever empty.

A sliding window w hides keys that lie w or more tokens back. `attention` and `prefix_attention`
count that distance by index, which is that of positions where no padding stands between tokens of
one segment: models.language moves it behind them (`padding_last`). Branches count it by position,
because other segments and padding stand between a prefix and its branches, and as the kernels
count by index alone, branches in a window always take "xla".

Backends: "auto" (`best_backend` of the devices), "xla" (everywhere, models.xla_attention), "dense"
(the same without blocks or a backward pass of its own: to compare, and to count products), "cudnn"
(NVIDIA, 16-bit; "xla" where its mask would be larger than XLA's logits, `_mask_is_larger`),
"splash" (TPU Pallas kernel, which never materialises logits), "splash_interpret" (the same kernel,
slowly, on any device).

On a mesh whose axis `context` is larger than 1, a prefix is split over it (parallel.context). Its
queries stay where they are and its keys and values are gathered, layer by layer: with few key/value
heads they are small (of Qwen2-7B in bfloat16 2 KiB a token and layer, against 7 KiB of queries).
Branches go to the keys: every device attends to its part of the prefix, and the parts of the one
softmax are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpo_jax.models.config import ATTENTION_BACKENDS
from tpo_jax.models.splash_mask import CausalMask
from tpo_jax.models.xla_attention import (
    TURN,
    Rule,
    attend,
    in_blocks,
    in_turns,
    in_turns_if_long,
    merge_heads,
    plain_attend,
)
from tpo_jax.parallel.context import AXIS, ContextLayout, context_devices, per_device, split_tokens
from tpo_jax.parallel.mesh import BATCH_AXES

_PLAIN = ("xla", "dense")
CUDNN_HEAD = 128  # widest head on every GPU that has the kernel
SPLASH_BLOCK = 128


def best_backend(platform: str, dtype: Any, head_dim: int, context: int = 1) -> str:
    """What "auto" stands for: splash on a TPU, cuDNN on a GPU where it can, XLA elsewhere.

    cuDNN has no float32, no heads above 128 or that 8 does not divide, and no rows that devices of
    the mesh axis `context` share.
    """
    if platform == "tpu":
        return "splash"
    can = jnp.dtype(dtype).itemsize == 2 and head_dim <= CUDNN_HEAD and head_dim % 8 == 0
    return "cudnn" if platform == "gpu" and can and context == 1 else "xla"


def _chosen(backend: str, q: jax.Array, context: int = 1) -> str:
    """`backend`, or for "auto" that of this process's devices; programs for other devices
    (training.program) name theirs."""
    if backend != "auto":
        return backend
    return best_backend(jax.default_backend(), q.dtype, q.shape[-1], context)


def _wants_mask(q_segments: jax.Array | None, causal_offset: int | None) -> bool:
    """Whether cuDNN's own causal rule, which starts at the first key, does not say all."""
    return q_segments is not None or causal_offset not in (None, 0)


def _mask_is_larger(
    q: jax.Array, q_segments: jax.Array | None, causal_offset: int | None
) -> bool:
    """Whether cuDNN wants a mask for q float[B, T, N, H] that is larger than the logits of "xla".

    For each key the mask has 5 bytes a query (bool, its bias and that one's gradient), whatever the
    heads. XLA's turns have 12 bytes a head for `TURN` queries: logits and their gradient as
    products in float32, and both in the 16 bits in which products read them.
    """
    _, T, N, _ = q.shape
    return _wants_mask(q_segments, causal_offset) and 5 * T > 12 * TURN * N


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
      backend: one of ATTENTION_BACKENDS.

    Returns: float[B, T, N, H] in the dtype of q.
    """
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: q_segments and kv_segments must be given together")
    if window is not None and causal_offset is None:
        raise ValueError(f"attention: window={window} needs a causal_offset")
    backend = _chosen(backend, q)
    if backend == "cudnn" and _mask_is_larger(q, q_segments, causal_offset):
        backend = "xla"
    if backend == "xla":
        rule = _rule(q, k, q_segments, kv_segments, causal_offset, window)
        if causal_offset is None:
            return attend(q, k, v, rule, window)[0].astype(q.dtype)
        return in_blocks(q, k, v, rule, causal_offset, window).astype(q.dtype)
    if backend == "dense":
        rule = _rule(q, k, q_segments, kv_segments, causal_offset, window)
        return plain_attend(q, k, v, rule, window)[0].astype(q.dtype)
    if backend == "cudnn":
        return _cudnn(q, k, v, q_segments, kv_segments, causal_offset, window)
    if backend in ("splash", "splash_interpret"):
        interpret = backend == "splash_interpret"
        return _splash(q, k, v, q_segments, kv_segments, causal_offset, window, interpret)
    raise ValueError(f"attention: backend {backend!r} is unknown; use one of {ATTENTION_BACKENDS}")


def _rule(
    q: jax.Array, k: jax.Array, q_segments: jax.Array | None, kv_segments: jax.Array | None,
    causal_offset: int | None, window: int | None,
) -> Rule:  # fmt: skip
    """The rule of `attention`, whose window counts by index."""
    segments = None if q_segments is None else (q_segments, kv_segments)
    if causal_offset is None:
        return Rule(segments)
    order = jnp.arange(q.shape[1]) + causal_offset, jnp.arange(k.shape[1])
    return Rule(segments, order, (order[0][None], order[1][None]))


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
    backend = _chosen(backend, q, layout.devices)
    if backend in _PLAIN:
        place = P(None, AXIS)

        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, order: jax.Array
        ) -> jax.Array:
            k, v, kv_segments = (layout.gather(x) for x in (k, v, segments))
            places = order, jnp.arange(k.shape[1])
            rule = Rule((segments, kv_segments), places, (places[0][None], places[1][None]))
            return in_turns(q, k, v, rule, window)[0].astype(q.dtype)

        args = (q, k, v, segments, jnp.asarray(layout.order))
        return per_device(local, args, (place,) * 4 + (P(AXIS),), place)
    if backend in ("splash", "splash_interpret"):
        return _context_splash(q, k, v, segments, layout, window, backend == "splash_interpret")
    raise ValueError(
        f"attention: backend {backend!r} cannot split a row over mesh.context={layout.devices}; "
        "set mesh.context=1, or model.attention to 'auto', 'xla' or 'splash'"
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

    The order of the prefix does not matter. Where it is split over `context`, and in a window, the
    xla path is taken whatever the backend: its logits are float32[B, N, K * T, P / C] on a device,
    of 256 queries at a time where that is long (models.xla_attention).

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
    backend = _chosen(backend, q, context_devices())
    by_index = window is None and isinstance(own_offset, int) and context_devices() == 1
    if backend in _PLAIN or not by_index:
        part = plain_attend if backend == "dense" else in_turns_if_long
        return _two_part_attention(
            part, q, prefix_k, prefix_v, own_k, own_v, q_segments, prefix_segments, own_segments,
            own_offset, window, positions,
        )  # fmt: skip
    B, K, T = q.shape[:3]
    P = prefix_k.shape[1]

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(B * K, *x.shape[2:])

    def joined(prefix: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.repeat(prefix, K, axis=0), fold(own)], axis=1)

    out = attention(
        fold(q), joined(prefix_k, own_k), joined(prefix_v, own_v),
        q_segments=fold(q_segments), kv_segments=joined(prefix_segments, own_segments),
        causal_offset=P + own_offset, backend=backend,
    )  # fmt: skip
    return out.reshape(q.shape)


def padding_last(segments: jax.Array) -> jax.Array:
    """int32[B, P]: the places of int32[B, P] segments in order, those of padding after the others.

    Tokens of one packed segment then stand side by side, as a window by index wants them.
    """
    return jnp.argsort(segments == 0, axis=1, stable=True)


def _two_part_attention(
    part: Callable[..., tuple[jax.Array, jax.Array]],
    q: jax.Array, prefix_k: jax.Array, prefix_v: jax.Array, own_k: jax.Array, own_v: jax.Array,
    q_segments: jax.Array, prefix_segments: jax.Array, own_segments: jax.Array,
    own_offset: int | jax.Array, window: int | None,
    positions: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> jax.Array:  # fmt: skip
    """One softmax over prefix and own keys; the prefix is never repeated K times.

    part: `in_turns_if_long` or `plain_attend`.
    """
    B, K, T, N, H = q.shape
    # Logits are split as these are; the compiler reduces over `context` where it sums over tokens.
    prefix_k, prefix_v, prefix_segments = (
        split_tokens(x, axis=1) for x in (prefix_k, prefix_v, prefix_segments)
    )

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(B * K, *x.shape[2:])

    # All K * T queries of a row are one long query axis against its prefix.
    rows = Rule((q_segments.reshape(B, K * T), prefix_segments))
    own_order = jnp.arange(T) + own_offset, jnp.arange(own_k.shape[2])
    own = Rule((fold(q_segments), fold(own_segments)), own_order)
    if window is not None:
        q_positions, prefix_positions, own_positions = positions
        rows = rows._replace(positions=(q_positions.reshape(B, K * T), prefix_positions))
        own = own._replace(positions=(fold(q_positions), fold(own_positions)))
    parts = (
        part(q.reshape(B, K * T, N, H), prefix_k, prefix_v, rows, window),
        part(fold(q), fold(own_k), fold(own_v), own, window),
    )
    outs = [out.reshape(q.shape) for out, _ in parts]
    log_sums = [merge_heads(log_sum).reshape(B, K, T, N, 1) for _, log_sum in parts]
    whole = jnp.logaddexp(*log_sums)
    shares = [jnp.exp(log_sum - whole) for log_sum in log_sums]
    return (outs[0] * shares[0] + outs[1] * shares[1]).astype(q.dtype)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array | None,
    kv_segments: jax.Array | None, causal_offset: int | None, window: int | None,
) -> jax.Array:  # fmt: skip
    """The kernel's own causal rule and window where they say all; else a mask
    bool[B or 1, 1, T, S], whose gradient wants even lengths."""
    run = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if not _wants_mask(q_segments, causal_offset):
        back = None if window is None else (window - 1, 0)
        return run(q, k, v, is_causal=causal_offset == 0, local_window_size=back)
    mask = _rule(q, k, q_segments, kv_segments, causal_offset, window).visible(window)[:, :, :, 0]
    T, more_t, more_s = q.shape[1], q.shape[1] % 2, k.shape[1] % 2
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
        for x, more in ((q, more_t), (k, more_s), (v, more_s))
    )
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more_t), (0, more_s)))
    return run(q, k, v, mask=mask)[:, :T]


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array | None,
    kv_segments: jax.Array | None, causal_offset: int | None, window: int | None, interpret: bool,
) -> jax.Array:  # fmt: skip
    """The Pallas kernel, per example and vmapped; lengths padded to whole blocks."""
    B, T, N, H = q.shape
    S = k.shape[1]
    padded_t, padded_s = (-(-size // SPLASH_BLOCK) * SPLASH_BLOCK for size in (T, S))
    if q_segments is None:
        q_segments, kv_segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)

    def lengthen(x: jax.Array, size: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    def heads_first(x: jax.Array, size: int) -> jax.Array:
        return lengthen(x, size).transpose(0, 2, 1, 3)

    q = heads_first(q * float(H) ** -0.5, padded_t)
    k, v = heads_first(k, padded_s), heads_first(v, padded_s)
    # Filling uses segment -1, which nothing real carries; its rows are cut off again.
    q_segments = lengthen(q_segments + 1, padded_t) - 1
    kv_segments = lengthen(kv_segments + 1, padded_s) - 1

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, q_segments: jax.Array, kv_segments: jax.Array
    ) -> jax.Array:
        kernel = _splash_kernel(padded_t, padded_s, q.shape[1], causal_offset, window, interpret)
        segments = splash_attention_kernel.SegmentIds(q=q_segments, kv=kv_segments)
        return jax.vmap(kernel)(q, k, v, segments)

    out = _per_device(local, k.shape[1])(q, k, v, q_segments, kv_segments)
    return out.transpose(0, 2, 1, 3)[:, :T]


def _context_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, layout: ContextLayout,
    window: int | None, interpret: bool,
) -> jax.Array:  # fmt: skip
    """`_splash` of a placed prefix: each device's queries against all keys."""
    mesh = jax.sharding.get_abstract_mesh()
    T, S = layout.length // layout.devices, layout.length
    more_t, more_s = -T % SPLASH_BLOCK, -S % SPLASH_BLOCK
    # A query that fills up a block repeats the last one, so that it sees something.
    order = np.pad(layout.order.reshape(-1, T), ((0, 0), (0, more_t)), mode="edge").ravel()
    rows, heads = P(BATCH_AXES, AXIS), _head_axis(mesh, k.shape[2])
    array = P(*rows, heads)

    def local(
        kernel: splash_attention_kernel.SplashAttentionKernel, q: jax.Array, k: jax.Array,
        v: jax.Array, segments: jax.Array,
    ) -> jax.Array:  # fmt: skip
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


def _per_device(function: Callable[..., jax.Array], kv_heads: int) -> Callable[..., jax.Array]:
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
) -> splash_attention_kernel.SplashAttentionKernel:  # fmt: skip
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
