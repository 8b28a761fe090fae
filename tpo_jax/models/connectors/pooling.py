"""Pooling of patch grids, and the newline tokens between what is left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.models.towers.interpolate import resize_grid


def pool_grid(x: jax.Array, mode: str, stride: int) -> jax.Array:
    """float[..., h, w, D] -> float[..., h', w', D].

    "average" and "max" take whole stride x stride cells (h' = h // stride); "bilinear" resizes to
    h' = ceil(h / stride) without anti-aliasing; "none" changes nothing.
    """
    if mode == "none":
        return x
    h, w, D = x.shape[-3:]
    if mode == "bilinear":
        return resize_grid(x, (-(-h // stride), -(-w // stride)))
    h, w = h // stride, w // stride
    cells = x[..., : h * stride, : w * stride, :]
    cells = cells.reshape(*x.shape[:-3], h, stride, w, stride, D)
    if mode == "max":
        return jnp.max(cells, axis=(-4, -2))
    return jnp.mean(cells, axis=(-4, -2), dtype=jnp.float32).astype(x.dtype)


def append_token(x: jax.Array, token: jax.Array) -> jax.Array:
    """float[..., n, D] with the vector `token` as entry n of the axis before the last."""
    last = jnp.broadcast_to(token.astype(x.dtype), (*x.shape[:-2], 1, x.shape[-1]))
    return jnp.concatenate([x, last], axis=-2)


def with_newlines(x: jax.Array, newline: jax.Array | None, mode: str) -> jax.Array:
    """float[B, F, h, w, D] -> float[B, V, D], newlines where `mode` says."""
    B, F, h, w, D = x.shape
    if mode == "grid":
        return append_token(x, newline).reshape(B, -1, D)
    if mode == "frame":
        return append_token(x.reshape(B, F, h * w, D), newline).reshape(B, -1, D)
    tokens = x.reshape(B, -1, D)
    return append_token(tokens, newline) if mode == "one_token" else tokens


def interleave(slow: jax.Array, fast: jax.Array, every: int, frames: int) -> jax.Array:
    """Tokens of slow and fast frames in the order of time.

    Args:
      slow: float[B, ceil(frames / every), n, D], frames 0, every, 2 * every, ...
      fast: float[B, the others, m, D].

    Returns: float[B, V, D].
    """
    B, _, n, D = slow.shape
    m, slows = fast.shape[2], slow.shape[1]
    joined = jnp.concatenate([slow.reshape(B, -1, D), fast.reshape(B, -1, D)], axis=1)
    order: list[np.ndarray] = []
    for frame in range(frames):
        before = -(-frame // every)  # slow frames before this one
        if frame % every == 0:
            order.append(before * n + np.arange(n))
        else:
            order.append(slows * n + (frame - before) * m + np.arange(m))
    return jnp.take(joined, np.concatenate(order), axis=1)
