"""LaSOT tracking: a folder per sequence with groundtruth.txt, one "x,y,w,h" in pixels a frame.

CLASS/CLASS-1/groundtruth.txt, beside it full_occlusion.txt and out_of_view.txt (0 or 1 per frame,
one line with commas; both have to be there), nlp.txt (a description) and img/00000001.jpg, ... The
object has no box where it is occluded or out of view. Frames are 30 a second. Boxes may stick out
of the frame and are cut.
testing_set.txt in the folder, a name such as airplane-1 a line, says which sequences are tested;
the others are for training. Without it nothing does.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data.formats import asking, tracks
from tpo_jax.data.formats.reading import Context, Format, Record, load_text
from tpo_jax.data.records import Example

FRAME_RATE = 30.0
ABSENCE = ("full_occlusion.txt", "out_of_view.txt")


TESTING = "testing_set.txt"


def records(context: Context) -> Iterator[Record]:
    path = context.file / TESTING
    tested = set(load_text(path).split()) if path.is_file() else None
    return tracks.sequences(context.file, functools.partial(_read, tested=tested))


def _read(truth: pathlib.Path, tested: set[str] | None) -> Any:
    boxes = tracks.read_boxes(truth)
    absent = [tracks.read_flags(truth.with_name(name), len(boxes)) for name in ABSENCE]
    split = None
    if tested is not None:
        split = "testing" if truth.parent.name in tested else "training"
    return boxes, [any(flags) for flags in zip(*absent, strict=True)], split


def parse(record: Any, label: str, context: Context) -> list[Example]:
    boxes, absent, _ = record
    rate = context.picture_rate or FRAME_RATE
    name = context.find(f"{label}/img", "sequence", label, label.split("/")[-1], frame_rate=rate)
    tracks.check_count(context, name, boxes)
    size = context.frame_size(name, "size")
    times = [i / rate for i in range(len(boxes))]
    targets = tracks.targets(boxes, absent, times, size, cut=True)
    return [context.example(name, label, "tracking", [asking.tracking()], targets)]


FORMAT = Format(
    *("lasot", "LaSOT tracking boxes, one folder per sequence", records, parse),
    split=lambda record, label: record[2],
)
