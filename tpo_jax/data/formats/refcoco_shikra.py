"""RefCOCO as JSON lines, as Shikra converts it: REC_refcoco_unc_train.jsonl.

{"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "width"?, "height"?, "dataset_name"?}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, json_lines, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

OPTIONAL = ("width", "height", "dataset_name")


def records(context: Context) -> Iterator[Record]:
    return json_lines(context.file)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("img_path", "expression", "bbox"), OPTIONAL)
    name = context.find(record["img_path"], "img_path")
    if "width" in record and "height" in record:
        width, height = (
            validation.check_number(key, record[key], 1, 1e6, "pixels")
            for key in ("width", "height")
        )
    else:
        width, height = context.frame_size(name, "width")
    if len(validation.check_list("bbox", record["bbox"])) != 4:
        raise Invalid("bbox", record["bbox"], "expected [x1, y1, x2, y2] in pixels", "correct it")
    x1, y1, x2, y2 = (
        validation.check_number("bbox", v, float("-inf"), float("inf"), "") for v in record["bbox"]
    )
    box = pixel_box("bbox", [x1, y1, x2 - x1, y2 - y1], width, height)
    turn = asking.region(validation.check_text("expression", record["expression"]))
    targets = {"boxes": [box], "times": [0]}
    media = context.kind(name, "image")
    key = label.replace(" ", "")
    return [context.example(name, key, "region", [turn], targets, media=media)]


FORMAT = Format("refcoco_shikra", "referring boxes, JSON lines with xyxy boxes", records, parse)
