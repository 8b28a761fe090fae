"""MeViS: meta_expressions.json (videos, expressions) and mask_dict.json (COCO RLE) beside it.

{"videos": {video: {"frames": [...], "expressions": {id: {"exp", "anno_id": [...], "obj_id"?}},
 "vid_id"?, "fps"?}}} and {anno_id: [RLE or null per frame]}. An expression that means several
objects is the union of their masks. Frame i is at i / fps seconds; the release has no `fps`, the
frame rate of the video file is used then, or --frame_rate for folders of pictures (JPEGImages).
The split `valid` is published without mask_dict.json, obj_id and anno_id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking, unlabelled
from tpo_jax.data.formats.masks import frame_number
from tpo_jax.data.formats.reading import Context, Format, Record, as_object, expand, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example
from tpo_jax.data.rles import merge_rles

EXPRESSIONS, MASKS = "meta_expressions.json", "mask_dict.json"


def records(context: Context) -> Iterator[Record]:
    """One record per expression; the file is the folder, or meta_expressions.json in it."""
    path = context.file / EXPRESSIONS if context.file.is_dir() else context.file
    data = load_json(path, dict)
    unlabelled.check_labels(context, MASKS, path.with_name(MASKS).is_file())
    masks = {} if context.unlabelled else load_json(path.with_name(MASKS), dict)
    context.keys(data, ("videos",), ("info",))
    context.coco_about(data)
    yield from expand(
        as_object("videos", data["videos"]).items(),
        lambda *item: _expressions(context, masks, *item),
    )


def _expressions(context: Context, masks: Any, video: str, entry: Any) -> Iterator[Record]:
    context.keys(entry, ("frames", "expressions"), ("vid_id", "fps"))
    for key, item in as_object("expressions", entry["expressions"]).items():
        yield f"{video}/{key}", (video, entry, item, masks)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, entry, item, masks = record
    fps = entry.get("fps")
    if fps is not None:
        fps = validation.check_number("fps", fps, 1e-6, float("inf"), "frames a second")
    name = context.find(video, "videos", frame_rate=fps)
    frames = validation.check_list("frames", entry["frames"])
    fps = fps or context.frame_rate(name, "fps")
    context.keys(item, ("exp",), ("anno_id", "obj_id"))
    unlabelled.check_labels(context, "anno_id", "anno_id" in item)
    turn = asking.referred_mask(validation.check_text("exp", item["exp"]))
    times = [i / fps for i in range(len(frames))]
    if context.unlabelled:
        numbers = [frame_number(frame, f"frames[{i}]") for i, frame in enumerate(frames)]
        targets = unlabelled.targets(numbers, times, context.frame_size(name, "size"))
    else:
        ids = validation.check_list("anno_id", item["anno_id"])
        targets = {"times": times, "rles": _union([_masks(masks, i, len(frames)) for i in ids])}
    return [context.example(name, label, "mask", [turn], targets)]


def _masks(table: Mapping[str, Any], anno_id: Any, count: int) -> Sequence[Any]:
    if str(anno_id) not in table:
        raise Invalid("anno_id", anno_id, f"{MASKS} has no such id", "correct the id")
    rles = validation.check_list(f"{MASKS}[{anno_id}]", table[str(anno_id)])
    if len(rles) != count:
        raise Invalid(
            "anno_id",
            anno_id,
            f"{MASKS} has {len(rles)} masks for {count} frames",
            "write one mask or null per frame",
        )
    return rles


def _union(tracks: Sequence[Sequence[Any]]) -> list[Any]:
    """Per frame: null where every object is absent, else the union."""
    if not tracks:
        raise Invalid("anno_id", [], "names no object", "name one, or remove it")
    if len(tracks) == 1:
        return list(tracks[0])
    return [_merge(frame, f"masks[{i}]") for i, frame in enumerate(zip(*tracks, strict=True))]


def _merge(rles: Sequence[Any], field: str) -> Mapping[str, Any] | None:
    present = [validation.check_rle(field, rle) for rle in rles if rle is not None]
    if len({tuple(rle["size"]) for rle in present}) > 1:
        raise Invalid(field, None, "masks of different sizes", "use one size")
    return merge_rles(present) if present else None


FORMAT = Format(
    *("mevis", "referring masks over time, meta_expressions + mask_dict", records, parse),
    unlabelled=True,
)
