"""Pixels as published checkpoints want them: uint8 frames in, uint8 frames of the tower's size out.

Resizing is Pillow's bicubic filter, as in the processors of `transformers` (docs/families.md says
whose own code has another); dividing by 255 and normalising happen on the device. `area` is this
project's own models' way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from tpo_jax.data.targets import area_resize
from tpo_jax.models.connectors.anyres import Size, best_resolution


def area(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, h, w, 3] -> uint8[n, size, size, 3]: mean over the area of each target pixel; the
    aspect ratio is not kept."""
    return np.rint(area_resize(frames, size, size)).astype(np.uint8)


def bicubic(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8[h, w, 3] -> uint8[height, width, 3]."""
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def stretch(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, h, w, 3] -> uint8[n, size, size, 3]: bicubic to a square; the aspect ratio is not
    kept (SigLIP, UMT)."""
    return np.stack([bicubic(frame, size, size) for frame in frames])


def crop(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8[n, h, w, 3] -> uint8[n, size, size, 3]: bicubic until the short side is `size`, then
    the middle square (CLIP, LanguageBind)."""
    height, width = frames.shape[1:3]
    short, long = min(height, width), int(size * max(height, width) / min(height, width))
    height, width = (size, long) if height == short else (long, size)
    top, left = (height - size) // 2, (width - size) // 2
    resized = (bicubic(frame, height, width) for frame in frames)
    return np.stack([frame[top : top + size, left : left + size] for frame in resized])


# uint8[n, h, w, 3], size -> uint8[n, size, size, 3]
Resize = Callable[[np.ndarray, int], np.ndarray]
RESIZES: dict[str, Resize] = {"area": area, "stretch": stretch, "crop": crop}


def resize_of(name: str, media: str, mean: Sequence[float]) -> Resize:
    """What a vision encoder's `resize` means for "video" or "image".

    Args:
      mean: of the encoder's pixels in [0, 1], the colour that "pad" puts around an image.
    """
    if name != "pad":
        return RESIZES[name]
    if media == "video":
        return crop
    return functools.partial(pad, colour=[int(255 * x) for x in mean])


def pad(frames: np.ndarray, size: int, colour: Sequence[int]) -> np.ndarray:
    """uint8[n, h, w, 3] -> uint8[n, size, size, 3]: a square of `colour` around each, then bicubic
    (images of the original Video-LLaVA)."""
    return stretch(np.stack([pad_to_square(frame, colour) for frame in frames]), size)


def pad_to_square(frame: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """uint8[h, w, 3] in the middle of a square of one colour."""
    height, width = frame.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = np.asarray(colour, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = frame
    return square


def anyres_tiles(frame: np.ndarray, resolutions: Sequence[Size], size: int) -> np.ndarray:
    """An image of any resolution as tiles of the tower's size.

    Args:
      frame: uint8[h, w, 3].
      resolutions: (height, width) that it may become, multiples of `size`.

    Returns:
      uint8[1 + rows * columns, size, size, 3]: the whole image stretched to one tile, then the
      tiles, rows first, of the image fitted into the best resolution and padded with black.
    """
    height, width = best_resolution(frame.shape[:2], resolutions)
    scale_h, scale_w = height / frame.shape[0], width / frame.shape[1]
    if scale_w < scale_h:
        fitted = (min(math.ceil(frame.shape[0] * scale_w), height), width)
    else:
        fitted = (height, min(math.ceil(frame.shape[1] * scale_h), width))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    canvas[top : top + fitted[0], left : left + fitted[1]] = bicubic(frame, *fitted)
    rows, columns = height // size, width // size
    tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    whole = bicubic(frame, size, size)[None]
    return np.concatenate([whole, tiles.reshape(rows * columns, size, size, 3)])
