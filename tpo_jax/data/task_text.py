"""Task targets as text: what a head would answer, written into the answer itself.

For models without heads, which learn places and times as words like any others; it is what task
heads are compared with. A box is four hundredths of the frame, "[36,23,59,45]" (x1, y1, x2, y2), a
window is seconds of the video, "3.5 s to 14.0 s", and a mask is its boxes at a few times, "0.0 s
[36,23,59,45], 7.5 s absent, 15.5 s [40,23,63,45]". `generation.task_text` reads them back.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.records import Example, PreparedDataset, VideoInfo
from tpo_jax.data.target_parts import part
from tpo_jax.data.text_features import Texts
from tpo_jax.errors import UserError
from tpo_jax.models.config import ClipFeaturesConfig

# Steps of a box coordinate, as in MiniGPT-v2 (Chen et al. 2023, 2310.09478).
BOX_STEPS = 100
# Times of a mask, evenly spread; more would be a longer answer than any other.
MASK_TIMES = 3
ABSENT = "absent"
_MARKER = re.compile(r"<(region|temporal|mask|box)>")


def box_text(box: Sequence[float]) -> str:
    """Normalised [x1, y1, x2, y2] -> "[36,23,59,45]"."""
    return "[" + ",".join(str(round(value * BOX_STEPS)) for value in box) + "]"


def window_text(window: Sequence[float]) -> str:
    """[3.5, 14] seconds -> "3.5 s to 14.0 s"."""
    return "{:.1f} s to {:.1f} s".format(*window)


def _region(targets: Mapping[str, Any], occurrence: int, example: Example) -> str:
    return box_text(targets["boxes"][occurrence])


def _temporal(targets: Mapping[str, Any], occurrence: int, example: Example) -> str:
    """Windows that meet the clip, cut to it, in order of time."""
    windows = np.clip(np.asarray(targets["windows"], float), example.start, example.end)
    windows = windows[windows[:, 1] > windows[:, 0]]
    return " and ".join(map(window_text, sorted(windows.tolist())))


def _mask(targets: Mapping[str, Any], occurrence: int, example: Example) -> str:
    """The boxes at up to MASK_TIMES annotated times of the clip, first and last among them."""
    times = np.asarray(targets["times"], float)
    inside = np.flatnonzero((times >= example.start) & (times <= example.end))
    rles = targets.get("rles") is not None
    labels = targets["rles"] if rles else targets["boxes"]
    spread = np.linspace(0, len(inside) - 1, min(MASK_TIMES, len(inside)))
    parts = []
    for label in inside[np.rint(spread).astype(int)]:
        box = rle_box(labels[label]) if rles else labels[label]
        parts.append(f"{times[label]:.1f} s {box_text(box) if box else ABSENT}")
    return ", ".join(parts)


def rle_box(rle: Mapping[str, Any] | None) -> list[float] | None:
    """Tight normalised box of a COCO RLE; None of an empty mask."""
    if rle is None or not coco_mask.area(dict(rle)):
        return None
    x, y, width, height = coco_mask.toBbox(dict(rle)).tolist()
    rows, columns = rle["size"]
    return [x / columns, y / rows, (x + width) / columns, (y + height) / rows]


_WRITERS: dict[str, Callable[[Mapping[str, Any], int, Example], str]] = {
    "region": _region, "temporal": _temporal, "mask": _mask,
    "box": lambda targets, occurrence, example: box_text(targets["input_box"]),
}  # fmt: skip


def with_text(example: Example, where: str = "example") -> Example:
    """The example with every marker replaced by the target behind it.

    Raises:
      ValueError: a marker without its target; names example and field.
    """
    seen: collections.Counter[str] = collections.Counter()

    def write(marker: re.Match[str]) -> str:
        name = marker[1]
        try:
            text = _WRITERS[name](part(example.targets, seen[name]), seen[name], example)
        except (KeyError, IndexError) as error:
            raise UserError(
                f"{where}: {example.example_id!r}: the text has {marker[0]}, but targets, which "
                f"has {sorted(example.targets)}, lacks what it stands for ({error}); add it or "
                "remove the example") from error
        if not text:
            raise UserError(
                f"{where}: {example.example_id!r}: no target of {marker[0]} lies in the clip "
                f"[{example.start}, {example.end}] s; remove the example")
        seen[name] += 1
        return text

    turns = tuple(
        dataclasses.replace(turn, question=_MARKER.sub(write, turn.question),
                            answer=_MARKER.sub(write, turn.answer))
        for turn in example.turns)
    return dataclasses.replace(example, turns=turns)


class TextDataset:
    """A prepared folder whose targets stand in the text; the interface of `PreparedDataset`."""

    def __init__(self, dataset: PreparedDataset):
        self.labelled = dataset

    @property
    def path(self) -> os.PathLike[str]:
        return self.labelled.path

    @property
    def videos(self) -> list[str]:
        return self.labelled.videos

    def video_info(self, video_id: str) -> VideoInfo:
        return self.labelled.video_info(video_id)

    def examples(self, video_id: str) -> list[Example]:
        """All examples about one video, without markers."""
        return [with_text(example, str(self.path)) for example in self.labelled.examples(video_id)]

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """uint8[F, h, w, 3]; see PreparedDataset."""
        return self.labelled.frames(video_id, indices)

    @property
    def clip_features_config(self) -> ClipFeaturesConfig | None:
        return self.labelled.clip_features_config

    def clip_features(self, video_id: str) -> np.ndarray:
        """float32[N, D]; see PreparedDataset."""
        return self.labelled.clip_features(video_id)

    @property
    def texts(self) -> Texts | None:
        return self.labelled.texts
