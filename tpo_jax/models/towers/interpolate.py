"""Interpolation along an axis as a constant matrix, with the conventions of PyTorch.

Pixels are cells: output i is centred at (i + 1/2) * old / new - 1/2 (align_corners=False).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# The parameter of the cubic kernel (Keys 1981); PyTorch uses this one, most image programs -0.5.
_CUBIC = -0.75


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - distance, 0.0)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, d = _CUBIC, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def resize_matrix(
    new: int, old: int, kernel: str = "linear", *, antialias: bool = False
) -> np.ndarray:
    """float64[new, old]: resized = matrix @ signal.

    Args:
      kernel: "linear" or "cubic".
      antialias: widens the kernel when shrinking and normalises at the edges. Without it, what
        lies outside repeats the edge.
    """
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    shape, reach = {"linear": (_linear, 1), "cubic": (_cubic, 2)}[kernel]
    if antialias:
        scale = max(old / new, 1.0)
        weights = shape(np.abs(centres[:, None] - np.arange(old)) / scale)
        return weights / weights.sum(axis=1, keepdims=True)
    if kernel == "linear":
        centres = np.maximum(centres, 0.0)
    matrix = np.zeros((new, old))
    first = np.floor(centres).astype(int)
    for step in range(1 - reach, reach + 1):
        source = first + step
        weight = shape(np.abs(centres - source))
        np.add.at(matrix, (np.arange(new), np.clip(source, 0, old - 1)), weight)
    return matrix


def resize_grid(
    x: jax.Array, size: tuple[int, int], kernel: str = "linear", *, antialias: bool = False
) -> jax.Array:
    """float[..., h, w, D] -> float[..., *size, D], in float32 inside."""
    h, w = x.shape[-3:-1]
    rows = resize_matrix(size[0], h, kernel, antialias=antialias)
    columns = resize_matrix(size[1], w, kernel, antialias=antialias)
    out = jnp.einsum(
        "ih,...hwd->...iwd", jnp.asarray(rows, jnp.float32), x.astype(jnp.float32)
    )
    out = jnp.einsum("jw,...iwd->...ijd", jnp.asarray(columns, jnp.float32), out)
    return out.astype(x.dtype)


def resize_positions(
    table: jax.Array, size: tuple[int, int], kernel: str, *, antialias: bool = False
) -> jax.Array:
    """A square position table float[g * g, D] for another grid: float[h * w, D]."""
    grid = round(table.shape[0] ** 0.5)
    if size == (grid, grid):
        return table
    square = table.reshape(grid, grid, table.shape[1])
    return resize_grid(square, size, kernel, antialias=antialias).reshape(-1, table.shape[1])
