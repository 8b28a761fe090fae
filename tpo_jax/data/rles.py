"""COCO's compressed run-length codes of masks: their union, and whether they are any."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def merge_rles(rles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The union of masks of one size."""
    merged = coco_mask.merge([dict(rle) for rle in rles], intersect=False)
    return {"size": list(merged["size"]), "counts": merged["counts"].decode()}


@functools.lru_cache(maxsize=4096)
def rle_pixels(counts: str) -> int:
    """The number of pixels that compressed counts describe; -1 when they are not COCO's code.

    COCO writes each run as a signed variable-length number of 5-bit groups in characters from "0",
    and from the fourth run on only the difference to the run two before.
    """
    groups = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = groups & 32 == 0  # of its number
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not last[-1]:
        return -1
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: no picture is so large
        return -1
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << shift, starts)
    runs -= np.where(groups[ends] & 16, np.int64(1) << 5 * lengths, 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if runs.min() >= 0 else -1
