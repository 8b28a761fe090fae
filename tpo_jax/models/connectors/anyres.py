"""Images of any resolution (LLaVA-NeXT, LLaVA-OneVision): the sizes that they go through.

An image is resized to fit into the best of several resolutions, padded to it and cut into tiles of
the tower's size; the whole image, resized to one tile, comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def packed_size(h: int, w: int, max_tiles: int, grid: int) -> Size:
    """(rows, columns) that a grid of h x w patches without padding becomes.

    Args:
      max_tiles: a grid of more patches than that many tiles have is resized to about as many
        (anyres_max_9: 9), where the sides differ by more than a tenth.
      grid: patches along the side of a tile.
    """
    ratio = math.sqrt(h * w / (max_tiles * grid * grid))
    return (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)
