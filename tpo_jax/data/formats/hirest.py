"""HiREST: {query: {video: {...}}}; the moment that answers a query, and the steps inside it.

Of each video: {"relevant", "clip", "v_duration" in seconds, "bounds": [s, e], "steps":
[{"index", "heading", "absolute_bounds": [s, e]}]}. One example per moment ("relevant" and "clip")
and per step. A video that is irrelevant, or relevant as a whole, has no moment to find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, as_object, expand, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example


def records(context: Context) -> Iterator[Record]:
    return expand(load_json(context.file, dict).items(), lambda *item: _videos(context, *item))


def _videos(context: Context, query: str, videos: Any) -> Iterator[Record]:
    yield from expand(as_object("", videos).items(), lambda *item: _moments(context, query, *item))


def _moments(context: Context, query: str, video: str, entry: Any) -> Iterator[Record]:
    context.keys(entry, ("relevant", "clip", "v_duration", "bounds", "steps"))
    for key in ("relevant", "clip"):
        if not isinstance(entry[key], bool):
            raise Invalid(key, entry[key], "expected true or false", "correct it")
    label = f"{query}/{video}"
    if entry["relevant"] and entry["clip"]:
        yield label, (video, query, "bounds", entry["bounds"], entry["v_duration"])
    for i, step in enumerate(validation.check_list("steps", entry["steps"])):
        field = f"steps[{i}]"
        try:
            context.keys(step, ("index", "heading", "absolute_bounds"), (), field)
        except Invalid as invalid:
            yield f"{label}/{i}", invalid
            continue
        bounds = f"{field}.absolute_bounds"
        yield (
            f"{label}/{i}",
            (video, step["heading"], bounds, step["absolute_bounds"], entry["v_duration"]),
        )


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, query, field, window, duration = record
    name = context.find(video, "video")
    duration = validation.check_number("v_duration", duration, 1e-3, math.inf, "seconds")
    targets = {"windows": [validation.check_window(field, window, duration)]}
    turn = asking.moment(validation.check_text("query", query))
    return [context.example(name, label, "temporal", [turn], targets)]


FORMAT = Format("hirest", "HiREST moments and steps", records, parse)
