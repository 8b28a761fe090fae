"""Ref-YouTube-VOS: meta_expressions.json and a palette PNG per frame; pixel value = obj_id.

{"videos": {video: {"expressions": {id: {"exp", "obj_id"}}, "frames": ["00000", "00005", ...]}}} in
meta_expressions/train/meta_expressions.json, masks in train/Annotations/VIDEO/00005.png. The names
of frames count pictures of a video of 30 a second. The split `valid` is published without masks and
obj_id; its JSON also has the videos of the split `test`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking, masks, unlabelled
from tpo_jax.data.formats.reading import (
    Context,
    Format,
    Record,
    as_object,
    expand,
    inside,
    load_json,
)
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

FRAME_RATE = 30.0
MASKS = "Annotations"


def records(context: Context) -> Iterator[Record]:
    """One record per expression."""
    data = load_json(context.file, dict)
    context.keys(data, ("videos",))
    folder = None if context.unlabelled else _masks(context.file)

    def expressions(video: str, entry: Any) -> Iterator[Record]:
        context.keys(entry, ("expressions", "frames"))
        for key, item in as_object("expressions", entry["expressions"]).items():
            yield f"{video}/{key}", (video, entry["frames"], item, folder)

    return expand(as_object("videos", data["videos"]).items(), expressions)


def _masks(path: pathlib.Path) -> pathlib.Path:
    """The folder of the masks: beside the JSON, or of the same split two folders up."""
    split = path.parent.name
    places = [path.parent / MASKS, *(p / split / MASKS for p in list(path.parents)[1:3])]
    for place in places:
        if place.is_dir():
            return place
    shown = " or ".join(map(str, places))
    raise Invalid(
        *("", None, f"there are no masks: no folder {shown}"),
        "use the training split; of one that is published without labels say --unlabelled",
    )


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, frames, item, folder = record
    rate = context.picture_rate or FRAME_RATE
    name = context.find(video, "videos", frame_rate=rate)
    context.keys(item, ("exp",), ("obj_id",))
    unlabelled.check_labels(context, "obj_id", "obj_id" in item)
    turn = asking.referred_mask(validation.check_text("exp", item["exp"]))
    frames = validation.check_list("frames", frames)
    numbers = [masks.frame_number(frame, f"frames[{i}]") for i, frame in enumerate(frames)]
    times = masks.frame_times(numbers, rate, "frames")
    if context.unlabelled:
        targets = unlabelled.targets(numbers, times, context.frame_size(name, "size"))
    else:
        targets = {"times": times, "rles": _rles(folder, video, frames, item["obj_id"])}
    return [context.example(name, label, "mask", [turn], targets)]


def _rles(
    folder: pathlib.Path, video: str, frames: Sequence[str], obj_id: Any
) -> list[masks.RLE | None]:
    """The masks of an object, one a frame."""
    number = masks.frame_number(str(obj_id), "obj_id")
    rles = [
        masks.encode(masks.read_labels(inside(folder, f"{video}/{frame}.png", "frames")) == number)
        for frame in frames
    ]
    if not any(rles):
        raise Invalid("obj_id", obj_id, "no mask has this object", "correct the id")
    return rles


FORMAT = Format(
    *("ref_youtube_vos", "Ref-YouTube-VOS expressions, palette masks", records, parse),
    unlabelled=True,
)
