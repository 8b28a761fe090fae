"""What GOT-10k and LaSOT share: sequence folders with a groundtruth.txt and flags per frame."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tpo_jax.data.formats.reading import Context, Record, load_text, pixel_box
from tpo_jax.data.problems import Invalid

TRUTH = "groundtruth.txt"


def sequences(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Iterator[Record]:
    """(folder below `path`, what `read` makes of its groundtruth.txt)."""
    if not path.is_dir():
        raise Invalid("", None, "expected the folder that holds the sequences", f"check {path}")
    found = sorted(path.rglob(TRUTH))
    if not found:
        raise Invalid("", None, f"no sequence folder with {TRUTH} below it", f"check {path}")
    for truth in found:
        label = truth.parent.relative_to(path).as_posix()
        try:
            yield label, read(truth)
        except Invalid as invalid:
            yield label, invalid


def read_boxes(truth: pathlib.Path) -> list[list[float]]:
    """A row of numbers per frame; a line is a frame by its place, so none may be blank."""
    boxes = []
    for i, line in enumerate(load_text(truth).rstrip().splitlines()):
        if not line.strip():
            raise Invalid(
                f"{TRUTH} line {i + 1}", line, "a blank line: the boxes after it would be those of "
                "earlier frames", "write the box of the frame, or remove the line",
            )  # fmt: skip
        try:
            boxes.append([float(v) for v in re.split(r"[,\s]+", line.strip())])
        except ValueError as error:
            raise Invalid(
                f"{TRUTH} line {i + 1}", line, "expected x,y,w,h", "correct it"
            ) from error
    return boxes


def read_flags(path: pathlib.Path, frames: int) -> list[bool]:
    """A 0 or 1 per frame, on lines or with commas."""
    if not path.is_file():
        raise Invalid(
            path.name, None, "the file is missing, which says where the object has no box",
            f"copy it to {path}",
        )  # fmt: skip
    words = re.split(r"[,\s]+", load_text(path).strip(" ,\n"))
    if len(words) != frames:
        raise Invalid(path.name, len(words), f"{TRUTH} has {frames} frames", "make them agree")
    for word in words:
        if word not in ("0", "1"):
            raise Invalid(path.name, word, "expected 0 or 1 per frame", "correct it")
    return [word == "1" for word in words]


def check_count(context: Context, name: str, boxes: Sequence[Any]) -> None:
    """Refuses fewer or more boxes than pictures, where the media `name` is a folder of them."""
    if context.media is None or not context.media.path(name).is_dir():
        return
    pictures = len(context.media.picture_numbers(name, TRUTH))
    if pictures != len(boxes):
        raise Invalid(
            TRUTH, len(boxes), f"{len(boxes)} boxes, but the video has {pictures} pictures",
            "make them agree: a line per picture",
        )  # fmt: skip


def targets(
    boxes: Sequence[Sequence[float]],
    absent: Sequence[bool],
    times: Sequence[float],
    size: tuple[int, int],
    cut: bool = False,
) -> dict[str, Any]:
    """Targets of a tracking example; `size` is (width, height) of the frames in pixels, which
    distances are measured in."""
    checked = [
        None if gone else pixel_box(f"{TRUTH} line {i + 1}", box, *size, cut)
        for i, (box, gone) in enumerate(zip(boxes, absent, strict=True))
    ]
    if not any(checked):
        raise Invalid(TRUTH, None, "the object is in no frame", "remove the sequence")
    return {
        "times": list(times),
        "boxes": checked,
        "input_box": next(box for box in checked if box is not None),
        "size": [size[1], size[0]],
    }
