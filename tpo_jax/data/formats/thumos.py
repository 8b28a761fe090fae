"""Action segments in the JSON of THUMOS14 and ActivityNet.

{"database": {video: {"annotations": [{"label", "segment": [s, e] in seconds}], "subset"?,
 "duration"?, "fps"?}}, "version"?, "taxonomy"?}
One file holds all splits: `subset` says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import splits
from tpo_jax.data.formats.reading import Context, Format, Record, as_object, load_json
from tpo_jax.data.records import Example, Turn

VIDEO_KEYS = ("subset", "duration", "fps", "frame", "url", "resolution", "duration_second")
SEGMENT_KEYS = ("segment(frames)", "label_id")
QUESTION = "Which actions happen in the video?"


def records(context: Context) -> Iterator[Record]:
    data = load_json(context.file, dict)
    context.keys(data, ("database",), ("version", "taxonomy"))
    return iter(as_object("database", data["database"]).items())


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("annotations",), VIDEO_KEYS)
    name = context.find(label, "database")
    duration = math.inf
    if record.get("duration") is not None:
        duration = validation.check_number("duration", record["duration"], 0, math.inf, "seconds")
    segments, labels = [], []
    for i, item in enumerate(validation.check_list("annotations", record["annotations"])):
        field = f"annotations[{i}]"
        context.keys(item, ("label", "segment"), SEGMENT_KEYS, field)
        labels.append(validation.check_text(f"{field}.label", item["label"]))
        ends = validation.check_list(f"{field}.segment", item["segment"])
        window = [float(v) if isinstance(v, str) and _is_number(v) else v for v in ends]
        segments.append(validation.check_window(f"{field}.segment", window, duration))
    if not segments:
        return []  # a video without actions is a legal background video
    answer = ", ".join(dict.fromkeys(labels))
    turns = [Turn(QUESTION, answer, (), "action")]
    targets = {"segments": segments, "labels": labels}
    return [context.example(name, label, "action", turns, targets)]


def _is_number(text: str) -> bool:
    """The release writes its seconds as text ("67.5")."""
    return text.replace(".", "", 1).strip().isdigit()


FORMAT = Format(
    *("thumos", "THUMOS14 / ActivityNet action segments JSON", records, parse),
    split=lambda record, label: splits.of_key(record, "subset"),
)
