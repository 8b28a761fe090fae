"""RefCOCO as JSON lines, as Shikra converts it: REC_refcoco_unc_train.jsonl.

{"img_path", "expression", "bbox": [x1, y1, x2, y2], "width"?, "height"?, "dataset_name"?}

Boxes are in pixels: Shikra divides them by the size of the image. A public file with these keys has
them divided already, so a file without any number above 1 is read as shares of width and height. No
single record is: in a file of pixels one within the first pixel is a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, json_lines, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

OPTIONAL = ("width", "height", "dataset_name")


def records(context: Context) -> Iterator[Record]:
    """Each line, and whether the boxes of the file are shares of the image."""
    lines = list(json_lines(context.file))
    shares = not any(_beyond_one(record) for _, record in lines)
    for label, record in lines:
        yield label, record if isinstance(record, Invalid) else (record, shares)


def _beyond_one(record: Any) -> bool:
    """Whether a number of the box cannot be a share."""
    box = record.get("bbox") if isinstance(record, Mapping) else None
    return isinstance(box, list) and any(isinstance(v, int | float) and v > 1 for v in box)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    record, shares = record
    context.keys(record, ("img_path", "expression", "bbox"), OPTIONAL)
    name = context.find(record["img_path"], "img_path")
    if "width" in record and "height" in record:
        width, height = (
            validation.check_number(key, record[key], 1, 1e6, "pixels")
            for key in ("width", "height")
        )
    else:
        width, height = context.frame_size(name, "width")
    box = _box(record["bbox"], width, height, shares)
    turn = asking.region(validation.check_text("expression", record["expression"]))
    targets = {"boxes": [box], "times": [0]}
    media = context.kind(name, "image")
    key = label.replace(" ", "")
    return [context.example(name, key, "region", [turn], targets, media=media)]


def _box(value: Any, width: float, height: float, shares: bool) -> list[float]:
    """Normalised [x1, y1, x2, y2] of a `bbox`."""
    if len(validation.check_list("bbox", value)) != 4:
        raise Invalid("bbox", value, "expected [x1, y1, x2, y2]", "correct it")
    x1, y1, x2, y2 = (
        validation.check_number("bbox", v, float("-inf"), float("inf"), "") for v in value
    )
    if shares:
        return validation.check_box("bbox", [x1, y1, x2, y2])
    if max(x1, y1, x2, y2) <= 1:
        raise Invalid(
            "bbox", value, "within one pixel, where other boxes of the file are in pixels",
            "multiply it by the width and the height",
        )  # fmt: skip
    return pixel_box("bbox", [x1, y1, x2 - x1, y2 - y1], width, height)


FORMAT = Format("refcoco_shikra", "referring boxes, JSON lines with xyxy boxes", records, parse)
