"""GOT-10k tracking: a folder per sequence with groundtruth.txt, one "x,y,w,h" in pixels a frame.

Beside it, optional as in the release: absence.label (1 = the object is not in this frame) and
meta_info.ini (anno_fps, resolution, object_class). The sequence folder has the name of its video.
"""

from __future__ import annotations

import configparser
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from tpo_jax.data.formats.reading import Context, Format, Record, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

TRUTH = "groundtruth.txt"
QUESTION = "Where does the object at <box> go?"  # not its class: the box must be read
ANSWER = "It moves along <mask>."


@dataclasses.dataclass(frozen=True)
class _Sequence:
    boxes: list[list[float]]  # pixels
    absent: list[bool]
    meta: dict[str, str]


def records(context: Context) -> Iterator[Record]:
    path = context.file
    if not path.is_dir():
        raise Invalid("", None, "expected the folder that holds the sequences", f"check {path}")
    found = sorted(path.rglob(TRUTH))
    if not found:
        raise Invalid("", None, f"no sequence folder with {TRUTH} below it", f"check {path}")
    for truth in found:
        label = truth.parent.relative_to(path).as_posix()
        try:
            yield label, _read(truth)
        except Invalid as invalid:
            yield label, invalid


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video = re.sub(r"#.*$", "", label)  # "<video>#<object>" when a video has several tracks
    name = context.find(video, "sequence")
    size = re.findall(r"\d+", record.meta.get("resolution", ""))
    width, height = map(int, size) if len(size) == 2 else context.frame_size(name, "resolution")
    rate = re.findall(r"[\d.]+", record.meta.get("anno_fps", ""))
    fps = float(rate[0]) if rate else context.frame_rate(name, "anno_fps")
    boxes = [
        None if gone else pixel_box(f"{TRUTH} line {i + 1}", box, width, height)
        for i, (box, gone) in enumerate(zip(record.boxes, record.absent, strict=True))
    ]
    if not any(boxes):
        raise Invalid(TRUTH, None, "the object is in no frame", "remove the sequence")
    turn = Turn(QUESTION, ANSWER, (), "tracking")
    targets = {
        "times": [i / fps for i in range(len(boxes))],
        "boxes": boxes,
        "input_box": next(box for box in boxes if box is not None),
    }
    return [context.example(name, label, "tracking", [turn], targets)]


def _read(truth: pathlib.Path) -> _Sequence:
    boxes = []
    for i, line in enumerate(truth.read_text("utf-8").split("\n")):
        if not line.strip():
            continue
        try:
            boxes.append([float(v) for v in re.split(r"[,\s]+", line.strip())])
        except ValueError as error:
            raise Invalid(
                f"{TRUTH} line {i + 1}", line, "expected x,y,w,h", "correct it"
            ) from error
    absent = [False] * len(boxes)
    label = truth.with_name("absence.label")
    if label.is_file():
        absent = [word == "1" for word in label.read_text("utf-8").split()]
    if len(absent) != len(boxes):
        raise Invalid(
            "absence.label", len(absent), f"{TRUTH} has {len(boxes)} frames", "make them agree"
        )
    return _Sequence(boxes, absent, _meta(truth.with_name("meta_info.ini")))


def _meta(path: pathlib.Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text("utf-8"))
    except configparser.Error as error:
        raise Invalid("meta_info.ini", None, f"not an INI file: {error}", "correct it") from error
    return {key: value for section in parser.sections() for key, value in parser[section].items()}


FORMAT = Format("got10k", "tracking boxes, one folder per sequence", records, parse)
