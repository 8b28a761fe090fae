"""Masks of many frames, kept small."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclasses.dataclass(frozen=True)
class Rles(Sequence):
    """Masks bool[n, height, width] as COCO RLEs {"size", "counts"}, None for an empty one."""

    items: tuple[dict[str, Any] | None, ...]
    height: int
    width: int

    @classmethod
    def of(cls, masks: np.ndarray | Rles) -> Rles:
        """Of bool[n, height, width], or what is one already."""
        if isinstance(masks, Rles):
            return masks
        encoded = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
        return cls(
            tuple({"size": list(rle["size"]), "counts": rle["counts"].decode()} if mask.any()
                  else None for rle, mask in zip(encoded, masks, strict=True)),
            *masks.shape[1:],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        """bool[height, width]"""
        rle = self.items[index]
        if rle is None:
            return np.zeros((self.height, self.width), bool)
        return coco_mask.decode(rle).astype(bool)
