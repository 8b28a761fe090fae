"""Label pictures (one number per object) and run-length codes to the targets of an example."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from tpo_jax.data import validation
from tpo_jax.data.problems import Invalid

VOID = 255  # pixels that nobody labelled
RLE = Mapping[str, Any]


@functools.lru_cache(maxsize=256)
def read_labels(path: pathlib.Path) -> np.ndarray:
    """uint8[h, w], the number of the object at each pixel, of a palette or grey PNG.

    The last pictures are remembered: each is asked for once per object.
    """
    name = path.name
    if not path.is_file():
        raise Invalid("masks", name, f"there is no {path}", "copy it, or remove its frame")
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Invalid("masks", name, f"it cannot be read: {error}", "copy it again") from error
    if mode not in ("P", "L", "1"):
        raise Invalid(
            "masks",
            name,
            f"its mode is {mode}: expected a palette or grey picture of object numbers",
            "do not convert the masks to colour",
        )
    return labels.astype(np.uint8)


def objects(pictures: Sequence[np.ndarray]) -> list[int]:
    """Numbers of all objects in label pictures uint8[h, w]."""
    found = set().union(*(np.unique(picture).tolist() for picture in pictures))
    return sorted(found - {0, VOID})


def encode(mask: np.ndarray) -> RLE | None:
    """The RLE of bool[h, w]; None for an empty one."""
    if not mask.any():
        return None
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def box(rle: RLE | None) -> list[float] | None:
    """[x1, y1, x2, y2] in [0, 1] around a mask that decodes; None for an empty one."""
    if rle is None:
        return None
    x, y, w, h = (float(v) for v in coco_mask.toBbox(dict(rle)))
    height, width = rle["size"]
    return [x / width, y / height, (x + w) / width, (y + h) / height] if w and h else None


def tracking_targets(times: Sequence[float], rles: Sequence[RLE | None]) -> dict[str, Any]:
    """Targets of a tracking example; the user's box is that of the first frame with the object,
    which `data.targets` looks up among the boxes."""
    boxes = [box(rle) for rle in rles]
    if not any(boxes):
        raise Invalid("masks", None, "the object is in no frame", "remove it")
    return {
        "times": list(times),
        "boxes": boxes,
        "input_box": next(b for b in boxes if b is not None),
        "rles": [rle if b else None for rle, b in zip(rles, boxes, strict=True)],
    }


def frame_number(name: Any, field: str) -> int:
    """The number of a frame's file name ("00005" or "00005.jpg")."""
    stem = pathlib.PurePosixPath(validation.check_text(field, name)).stem
    digits = re.findall(r"\d+", stem)
    if not digits:
        raise Invalid(field, name, "expected the number of a frame, as 00005", "correct it")
    return int(digits[-1])


def frame_times(numbers: Sequence[int], rate: float, field: str) -> list[float]:
    """Seconds from the first frame; raises Invalid where the numbers do not rise."""
    if not numbers:
        raise Invalid(field, [], "there is no frame", "remove the video")
    if sorted(set(numbers)) != list(numbers):
        raise Invalid(field, numbers[:10], "the frames are not in order", "sort them")
    return [(n - numbers[0]) / rate for n in numbers]
