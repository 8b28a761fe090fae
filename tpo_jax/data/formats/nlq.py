"""Natural Language Queries of Ego4D: nlq_train.json, nlq_val.json.

{"videos": [{"video_uid", "clips": [{"clip_uid", "video_start_sec", "video_end_sec", "annotations":
 [{"annotation_uid", "language_queries": [{"query", "clip_start_sec", "clip_end_sec", ...}]}]}]}]}

The media are the clips (<clip_uid>.mp4); where only the whole video is there (<video_uid>.mp4) the
example is about the part of it that the clip was cut from. `split`, of a video or else of the
file, says where the queries belong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, expand, load_json
from tpo_jax.data.records import Example

CLIP_KEYS = (
    *("clip_start_sec", "clip_end_sec", "clip_start_frame", "clip_end_frame"),
    *("video_start_frame", "video_end_frame", "source_clip_uid"),
)
QUERY_KEYS = (
    *("video_start_sec", "video_end_sec", "video_start_frame", "video_end_frame"),
    *("template", "slot_x", "verb_x", "slot_y", "verb_y", "raw_tags"),
)


def records(context: Context) -> Iterator[Record]:
    data = load_json(context.file, dict)
    context.keys(data, ("videos",), ("version", "date", "description", "manifest", "split"))
    of_file = data.get("split")
    return expand(
        _numbered("videos", data["videos"]), lambda *item: _clips(context, of_file, *item)
    )


def _numbered(field: str, items: Any) -> Iterator[Record]:
    return ((f"{field}[{i}]", v) for i, v in enumerate(validation.check_list(field, items)))


def _clips(context: Context, split: Any, label: str, video: Any) -> Iterator[Record]:
    context.keys(video, ("video_uid", "clips"), ("split",))
    about = video["video_uid"], video.get("split", split)
    yield from expand(
        _numbered(f"{label}.clips", video["clips"]),
        lambda *item: _annotations(context, about, *item),
    )


def _annotations(
    context: Context, about: tuple[Any, Any], label: str, clip: Any
) -> Iterator[Record]:
    """One record per query: video_uid and split (`about`), clip, query."""
    required = ("clip_uid", "video_start_sec", "video_end_sec", "annotations")
    context.keys(clip, required, CLIP_KEYS)

    def queries(label: str, annotation: Any) -> Iterator[Record]:
        context.keys(annotation, ("annotation_uid", "language_queries"))
        found = validation.check_list("language_queries", annotation["language_queries"])
        for i, query in enumerate(found):
            yield f"{clip['clip_uid']}/{annotation['annotation_uid']}_{i}", (*about, clip, query)

    yield from expand(_numbered(f"{label}.annotations", clip["annotations"]), queries)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, _, clip, query = record
    context.keys(query, ("query", "clip_start_sec", "clip_end_sec"), QUERY_KEYS)
    start, end = validation.check_window(
        "video_start_sec, video_end_sec",
        [clip["video_start_sec"], clip["video_end_sec"]],
        math.inf,
    )
    window = validation.check_window(
        "clip_start_sec, clip_end_sec",
        [query["clip_start_sec"], query["clip_end_sec"]],
        end - start,
    )
    turn = asking.moment(validation.check_text("query", query["query"]))
    changes = {}
    name = validation.check_text("clip_uid", clip["clip_uid"])
    if not context.has(name) and context.has(validation.check_text("video_uid", video)):
        name, changes = video, {"start": start, "end": end}
        window = [start + t for t in window]
    name = context.find(name, "clip_uid")
    return [context.example(name, label, "temporal", [turn], {"windows": [window]}, **changes)]


FORMAT = Format(
    *("nlq", "Ego4D natural language queries", records, parse),
    split=lambda record, label: record[1],
)
