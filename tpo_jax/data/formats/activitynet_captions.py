"""ActivityNet Captions: {video: {"duration", "timestamps": [[s, e], ...], "sentences": [...]}}.

Each sentence is one example, about the moment that it describes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, expand, load_json, paired
from tpo_jax.data.records import Example


def records(context: Context) -> Iterator[Record]:
    def sentences(video: str, entry: Any) -> Iterator[Record]:
        context.keys(entry, ("duration", "timestamps", "sentences"))
        for i, pair in enumerate(paired(entry, "timestamps", "sentences")):
            yield f"{video}/{i}", (video, entry["duration"], i, pair)

    return expand(load_json(context.file, dict).items(), sentences)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, duration, i, (window, sentence) = record
    name = context.find(video, "video")
    duration = validation.check_number("duration", duration, 1e-3, math.inf, "seconds")
    targets = {"windows": [validation.check_window(f"timestamps[{i}]", window, duration)]}
    turn = asking.moment(validation.check_text(f"sentences[{i}]", sentence))
    return [context.example(name, label, "temporal", [turn], targets)]


FORMAT = Format("activitynet_captions", "ActivityNet Captions moments", records, parse)
