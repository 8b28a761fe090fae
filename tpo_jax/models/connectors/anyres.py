"""Images of any resolution as tiles (LLaVA-NeXT, LLaVA-OneVision): from tile features to tokens.

An image is resized to fit into the best of several resolutions, padded to it and cut into tiles of
the tower's size; the whole image, resized to one tile, comes first. All numbers here are known
before anything is computed, so shapes are static for an image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from tpo_jax.models.connectors.pooling import append_token
from tpo_jax.models.towers.interpolate import resize_grid

Size = tuple[int, int]


def best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The (height, width) that keeps most of an image of `size`, and then wastes least."""

    def score(resolution: Size) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - height * width

    return max(resolutions, key=score)  # the first of equals


def unpadded(size: Size, canvas: Size) -> tuple[Size, Size]:
    """(top, left), (height, width) of the part of a canvas that an image of `size` fills.

    Sizes may be in any unit: a grid of patches is a canvas.
    """
    height, width = canvas
    if size[1] / size[0] > width / height:
        filled = int(round(size[0] * (width / size[1]), 7))
        top = (height - filled) // 2
        return (top, 0), (height - 2 * top, width)
    filled = int(round(size[1] * (height / size[0]), 7))
    left = (width - filled) // 2
    return (0, left), (height, width - 2 * left)


def pack_tiles(
    tiles: jax.Array,
    newline: jax.Array,
    size: Size,
    resolutions: Sequence[Size],
    tile_size: int,
    max_tiles: int,
) -> jax.Array:
    """Tokens of one image: the whole image, then its tiles as one grid without the padding.

    Args:
      tiles: float[1 + rows * columns, g * g, D], projected; the whole image first.
      newline: float[D], after every row of the grid.
      size: (height, width) of the original image.
      resolutions: (height, width) that the image may have become, in pixels.
      tile_size: side of a tile in pixels.
      max_tiles: a grid of more patches than that many tiles have is resized to about as many
        (anyres_max_9: 9), where the sides differ by more than a tenth.

    Returns: float[V, D].
    """
    height, width = best_resolution(size, resolutions)
    rows, columns = height // tile_size, width // tile_size
    g, D = math.isqrt(tiles.shape[1]), tiles.shape[-1]
    if tiles.shape[0] != 1 + rows * columns:
        raise ValueError(
            f"image of {size[0]} x {size[1]} pixels: {tiles.shape[0]} tiles, but the best "
            f"resolution {height} x {width} has 1 + {rows} x {columns}"
        )
    grid = tiles[1:].reshape(rows, columns, g, g, D).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * g, columns * g, D)
    (top, left), (h, w) = unpadded(size, grid.shape[:2])
    grid = grid[top : top + h, left : left + w]
    ratio = math.sqrt(h * w / (max_tiles * g * g))
    if ratio > 1.1:
        grid = resize_grid(grid, (int(h // ratio), int(w // ratio)))
    grid = append_token(grid, newline).reshape(-1, D)
    return jax.numpy.concatenate([tiles[0], grid])


def packed_tokens(
    size: Size, resolutions: Sequence[Size], tile_size: int, max_tiles: int, grid: int
) -> int:
    """How many tokens `pack_tiles` gives for an image of `size`."""
    shape = tuple(side // tile_size * grid for side in best_resolution(size, resolutions))
    _, (h, w) = unpadded(size, shape)
    ratio = math.sqrt(h * w / (max_tiles * grid * grid))
    if ratio > 1.1:
        h, w = int(h // ratio), int(w // ratio)
    return grid * grid + h * (w + 1)
