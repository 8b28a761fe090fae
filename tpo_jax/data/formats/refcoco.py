"""RefCOCO, RefCOCO+ and RefCOCOg as JSON: COCO `images`, `annotations` (bbox [x, y, w, h] in
pixels) and `refs`, which name an annotation and its sentences.

--annotations is one JSON with all three, or the folder of the release in which its pickle
`refs(unc).p` was converted to `refs(unc).json` (pickles are not loaded; the error says how to
convert one). With several, name the one: refcoco/refs(unc).json; instances.json is beside it.
An image may be a frame of a video: `file_name` is the video then, `time` says which frame, in
seconds. One file holds all splits (train, val, testA, ...): `split` of a ref says which.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking, splits
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

IMAGE_KEYS = ("width", "height", "time", "license", "coco_url", "flickr_url", "date_captured")
BOX_KEYS = ("category_id", "area", "iscrowd", "segmentation")
REF_KEYS = ("image_id", "category_id", "file_name", "sent_ids", "split")
SENTENCE_KEYS = ("raw", "sent_id", "tokens")
INSTANCES = "instances.json"
CONVERT = (
    "a pickle may run any program, so convert it where you trust it: "
    "python -c \"import json, pickle; refs = pickle.load(open('{name}', 'rb')); "
    "json.dump(refs, open('{json}', 'w'))\""
)


def records(context: Context) -> Iterator[Record]:
    """Each ref with its annotation and image joined in."""
    refs, data = _load(context)
    context.keys(data, ("images", "annotations"), ("refs", *COCO_ABOUT))
    context.coco_about(data)
    images = _by_id(data["images"], "images")
    boxes = _by_id(data["annotations"], "annotations")
    for i, ref in enumerate(validation.check_list("refs", refs)):
        label = f"ref {ref['ref_id']}" if isinstance(ref, Mapping) and "ref_id" in ref else str(i)
        yield label, (ref, images, boxes)


def _load(context: Context) -> tuple[Any, Mapping[str, Any]]:
    """(refs, the file with images and annotations)."""
    path = context.file
    if path.is_dir():
        found = sorted(path.glob("refs*.json"))
        if len(found) != 1:
            _refuse_pickle(next(iter(sorted(path.glob("refs*.p"))), None) if not found else None)
            names = [file.name for file in found]
            raise Invalid("", names, "expected one refs*.json in the folder", "name the file")
        (path,) = found
    if path.suffix in (".p", ".pkl", ".pickle"):
        _refuse_pickle(path)
    instances = path.with_name(INSTANCES)
    if path.name.startswith("refs") and instances.is_file():
        return load_json(path, list), load_json(instances, dict)
    data = load_json(path, dict)
    context.keys(data, ("refs", "images", "annotations"), tuple(COCO_ABOUT))
    return data["refs"], data


def _refuse_pickle(path: pathlib.Path | None) -> None:
    if path is not None:
        fix = CONVERT.format(name=path, json=path.with_suffix(".json"))
        raise Invalid("", path.name, "it is a pickle, which is not loaded", fix)


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
        turn = asking.region(sentence, time if kind == "video" else None)
        example_label = f"{label.replace(' ', '')}/{i}"
        examples.append(context.example(name, example_label, "region", [turn], targets, media=kind))
    return examples


def _by_id(items: Any, field: str) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for i, item in enumerate(validation.check_list(field, items)):
        if not isinstance(item, Mapping) or not isinstance(item.get("id"), int | str):
            raise Invalid(f"{field}[{i}]", item, "expected an object with 'id'", "add it")
        if item["id"] in found:
            raise Invalid(f"{field}[{i}].id", item["id"], "used twice", "make ids unique")
        found[item["id"]] = item
    return found


def _lookup(table: Mapping[Any, Any], key: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(key, int | str) or key not in table:
        raise Invalid(field, key, "no entry has this id", "correct the id")
    return table[key]


FORMAT = Format(
    *("refcoco", "referring boxes, COCO JSON with refs", records, parse),
    split=lambda record, label: splits.of_key(record[0], "split"),
)
