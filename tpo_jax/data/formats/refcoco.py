"""RefCOCO as JSON: COCO `images` and `annotations` (bbox [x, y, w, h] in pixels) plus `refs`.

A ref names an annotation and its sentences. An image may be a frame of a video: `file_name` is the
video then, and `time` says which frame, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import Context, Format, Record, load_json, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

IMAGE_KEYS = ("width", "height", "time", "license", "coco_url", "flickr_url", "date_captured")
BOX_KEYS = ("category_id", "area", "iscrowd", "segmentation")
REF_KEYS = ("image_id", "category_id", "file_name", "sent_ids", "split")
SENTENCE_KEYS = ("raw", "sent_id", "tokens")
QUESTION = 'Where is "{sentence}"?'
QUESTION_AT_TIME = 'Where is "{sentence}" at {time:g} s?'
ANSWER = "It is at <region>."


def records(context: Context) -> Iterator[Record]:
    """Each ref with its annotation and image joined in."""
    data = load_json(context.file)
    context.keys(data, ("images", "annotations", "refs"), ("info", "licenses", "categories"))
    images = _by_id(data["images"], "images")
    boxes = _by_id(data["annotations"], "annotations")
    for i, ref in enumerate(validation.check_list("refs", data["refs"])):
        label = f"ref {ref['ref_id']}" if isinstance(ref, Mapping) and "ref_id" in ref else str(i)
        yield label, (ref, images, boxes)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    ref, images, boxes = record
    context.keys(ref, ("ref_id", "ann_id", "sentences"), REF_KEYS, "refs")
    box = _lookup(boxes, ref["ann_id"], "refs.ann_id")
    context.keys(box, ("id", "image_id", "bbox"), BOX_KEYS, "annotations")
    image = _lookup(images, box["image_id"], "annotations.image_id")
    context.keys(image, ("id", "file_name"), IMAGE_KEYS, "images")
    name = context.find(image["file_name"], "images.file_name")
    if "width" in image and "height" in image:
        width = validation.check_number("images.width", image["width"], 1, 1e6, "pixels")
        height = validation.check_number("images.height", image["height"], 1, 1e6, "pixels")
    else:
        width, height = context.frame_size(name, "images.width")
    time = validation.check_number("images.time", image.get("time", 0), 0, float("inf"), "seconds")
    targets = {
        "boxes": [pixel_box("annotations.bbox", box["bbox"], width, height)],
        "times": [time],
    }
    kind = context.kind(name, "video" if "time" in image else "image")
    examples = []
    for i, item in enumerate(validation.check_list("refs.sentences", ref["sentences"])):
        field = f"refs.sentences[{i}]"
        context.keys(item, ("sent",), SENTENCE_KEYS, field)
        sentence = validation.check_text(f"{field}.sent", item["sent"])
        question = QUESTION if kind == "image" else QUESTION_AT_TIME
        turn = Turn(question.format(sentence=sentence, time=time), ANSWER, (), "region")
        example_label = f"{label.replace(' ', '')}/{i}"
        examples.append(context.example(name, example_label, "region", [turn], targets, media=kind))
    return examples


def _by_id(items: Any, field: str) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for i, item in enumerate(validation.check_list(field, items)):
        if not isinstance(item, Mapping) or "id" not in item:
            raise Invalid(f"{field}[{i}]", item, "expected an object with 'id'", "add it")
        if item["id"] in found:
            raise Invalid(f"{field}[{i}].id", item["id"], "used twice", "make ids unique")
        found[item["id"]] = item
    return found


def _lookup(table: Mapping[Any, Any], key: Any, field: str) -> Mapping[str, Any]:
    if key not in table:
        raise Invalid(field, key, "no entry has this id", "correct the id")
    return table[key]


FORMAT = Format("refcoco", "referring boxes, COCO JSON with refs", records, parse)
