"""MeViS: meta_expressions.json (videos, expressions) and mask_dict.json (COCO RLE) beside it.

{"videos": {video: {"frames": [...], "expressions": {id: {"exp", "anno_id": [...], "obj_id"?}},
 "vid_id"?, "fps"?}}} and {anno_id: [RLE or null per frame]}. An expression that means several
objects is the union of their masks. Frame i is at i / fps seconds; the release has no `fps`, the
frame rate of the video file is used then.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import Context, Format, Record, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

EXPRESSIONS, MASKS = "meta_expressions.json", "mask_dict.json"
QUESTION = 'Which pixels show "{expression}"?'
ANSWER = "It is <mask>."


def records(path: pathlib.Path) -> Iterator[Record]:
    """`path` is the folder, or meta_expressions.json in it."""
    folder = path if path.is_dir() else path.parent
    data = load_json(folder / EXPRESSIONS if path.is_dir() else path)
    masks = load_json(folder / MASKS)
    validation.check_keys(data, ("info",), ("videos",))
    for video, entry in data["videos"].items():
        yield video, (entry, masks)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    entry, masks = record
    context.keys(entry, ("frames", "expressions"), ("vid_id", "fps"))
    name = context.find(label, "videos")
    frames = validation.check_list("frames", entry["frames"])
    if "fps" in entry:
        fps = validation.check_number("fps", entry["fps"], 1e-6, float("inf"), "frames a second")
    else:
        fps = context.frame_rate(name, "fps")
    times = [i / fps for i in range(len(frames))]
    examples = []
    for key, item in entry["expressions"].items():
        field = f"expressions.{key}"
        context.keys(item, ("exp", "anno_id"), ("obj_id",), field)
        text = validation.check_text(f"{field}.exp", item["exp"])
        ids = validation.check_list(f"{field}.anno_id", item["anno_id"])
        rles = _union([_masks(masks, i, len(frames), field) for i in ids], field)
        turn = Turn(QUESTION.format(expression=text), ANSWER, (), "mask")
        targets = {"times": times, "rles": rles}
        examples.append(context.example(name, f"{label}/{key}", "mask", [turn], targets))
    return examples


def _masks(table: Mapping[str, Any], anno_id: Any, count: int, field: str) -> Sequence[Any]:
    if str(anno_id) not in table:
        raise Invalid(f"{field}.anno_id", anno_id, f"{MASKS} has no such id", "correct the id")
    rles = validation.check_list(f"{MASKS}[{anno_id}]", table[str(anno_id)])
    if len(rles) != count:
        raise Invalid(
            f"{field}.anno_id",
            anno_id,
            f"{MASKS} has {len(rles)} masks for {count} frames",
            "write one mask or null per frame",
        )
    return rles


def _union(tracks: Sequence[Sequence[Any]], field: str) -> list[Any]:
    """Per frame: null where every object is absent, else the union."""
    if not tracks:
        raise Invalid(f"{field}.anno_id", [], "names no object", "name one, or remove it")
    union: list[Any] = []
    for i, frame in enumerate(zip(*tracks, strict=True)):
        present = [rle for rle in frame if rle is not None]
        for rle in present:
            validation.check_rle(f"{field}.masks[{i}]", rle)
        if len({tuple(rle["size"]) for rle in present}) > 1:
            raise Invalid(f"{field}.masks[{i}]", None, "masks of different sizes", "use one size")
        union.append(
            None
            if not present
            else present[0]
            if len(present) == 1
            else validation.merge_rles(present)
        )
    return union


FORMAT = Format("mevis", "referring masks over time, meta_expressions + mask_dict", records, parse)
