"""RefCOCO as COCO JSON with a caption per image, as MDETR and ReferFormer convert it.

{"images": [{"id", "file_name", "width", "height", "caption", ...}], "annotations": [{"image_id",
 "bbox": [x, y, w, h] in pixels, ...}]}: finetune_refcoco_train.json, instances_refcoco_train.json.
An image is repeated for each of its sentences, under an id of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import (
    COCO_ABOUT,
    Context,
    Format,
    Record,
    load_json,
    pixel_box,
)
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

IMAGE_KEYS = ("original_id", "dataset_name", "tokens_negative")
BOX_KEYS = (
    *("id", "area", "iscrowd", "category_id", "original_id", "segmentation"),
    *("tokens_positive",),
)


def records(context: Context) -> Iterator[Record]:
    """One record per sentence, with its box joined in."""
    data = load_json(context.file, dict)
    context.keys(data, ("images", "annotations"), tuple(COCO_ABOUT))
    context.coco_about(data)
    boxes: dict[int | str, list[Any]] = {}
    for i, box in enumerate(validation.check_list("annotations", data["annotations"])):
        key = box.get("image_id") if isinstance(box, Mapping) else None
        if isinstance(key, int | str):
            boxes.setdefault(key, []).append(box)
        else:
            expected = "expected an object with 'image_id' and 'bbox'"
            yield f"annotations[{i}]", Invalid("image_id", box, expected, "correct it")
    for i, image in enumerate(validation.check_list("images", data["images"])):
        yield f"images[{i}]", (image, boxes)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    image, boxes = record
    required = ("id", "file_name", "width", "height", "caption")
    context.keys(image, required, IMAGE_KEYS, "images")
    found = boxes.get(image["id"], []) if isinstance(image["id"], int | str) else []
    if len(found) != 1:
        raise Invalid("images.id", image["id"], f"{len(found)} boxes, expected one", "correct it")
    (box,) = found
    context.keys(box, ("image_id", "bbox"), BOX_KEYS, "annotations")
    name = context.find(image["file_name"], "images.file_name")
    width, height = (
        validation.check_number(f"images.{key}", image[key], 1, 1e6, "pixels")
        for key in ("width", "height")
    )
    targets = {
        "boxes": [pixel_box("annotations.bbox", box["bbox"], width, height)],
        "times": [0],
    }
    turn = asking.region(validation.check_text("images.caption", image["caption"]))
    media = context.kind(name, "image")
    return [context.example(name, str(image["id"]), "region", [turn], targets, media=media)]


FORMAT = Format("refcoco_mdetr", "referring boxes, COCO JSON with captions", records, parse)
