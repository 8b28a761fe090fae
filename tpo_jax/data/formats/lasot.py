"""LaSOT tracking: a folder per sequence with groundtruth.txt, one "x,y,w,h" in pixels a frame.

CLASS/CLASS-1/groundtruth.txt, beside it full_occlusion.txt and out_of_view.txt (0 or 1 per frame,
one line with commas), nlp.txt (a description) and img/00000001.jpg, ... The object has no box where
it is occluded or out of view. Frames are 30 a second. Boxes may stick out of the frame and are cut.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data.formats import asking, tracks
from tpo_jax.data.formats.reading import Context, Format, Record
from tpo_jax.data.records import Example

FRAME_RATE = 30.0
ABSENCE = ("full_occlusion.txt", "out_of_view.txt")


def records(context: Context) -> Iterator[Record]:
    return tracks.sequences(context.file, _read)


def _read(truth: pathlib.Path) -> Any:
    boxes = tracks.read_boxes(truth)
    absent = [tracks.read_flags(truth.with_name(name), len(boxes)) for name in ABSENCE]
    return boxes, [any(flags) for flags in zip(*absent, strict=True)]


def parse(record: Any, label: str, context: Context) -> list[Example]:
    boxes, absent = record
    rate = context.picture_rate or FRAME_RATE
    name = context.find(f"{label}/img", "sequence", label, label.split("/")[-1], frame_rate=rate)
    size = context.frame_size(name, "size")
    times = [i / rate for i in range(len(boxes))]
    targets = tracks.targets(boxes, absent, times, size, cut=True)
    return [context.example(name, label, "tracking", [asking.tracking()], targets)]


FORMAT = Format("lasot", "LaSOT tracking boxes, one folder per sequence", records, parse)
