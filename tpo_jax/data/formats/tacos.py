"""TACoS as 2D-TAN and VSLNet share it: frame numbers instead of seconds.

{"s13-d21.avi": {"timestamps": [[first, last], ...] in frames, "sentences": [...], "fps",
 "num_frames"}}
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, expand, load_json, paired
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example


def records(context: Context) -> Iterator[Record]:
    def sentences(video: str, entry: Any) -> Iterator[Record]:
        context.keys(entry, ("timestamps", "sentences", "fps", "num_frames"))
        for i, pair in enumerate(paired(entry, "timestamps", "sentences")):
            yield f"{video}/{i}", (video, entry, i, pair)

    return expand(load_json(context.file, dict).items(), sentences)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, entry, i, (frames, sentence) = record
    name = context.find(video, "video", pathlib.PurePosixPath(video).stem)
    fps = validation.check_number("fps", entry["fps"], 1e-6, math.inf, "frames a second")
    count = validation.check_number("num_frames", entry["num_frames"], 1, math.inf, "frames")
    field = f"timestamps[{i}]"
    if len(validation.check_list(field, frames)) != 2:
        raise Invalid(field, frames, "expected [first, last] in frames", "write two numbers")
    seconds = [validation.check_number(field, f, 0, math.inf, "frames") / fps for f in frames]
    try:
        targets = {"windows": [validation.check_window(field, seconds, count / fps)]}
    except Invalid as invalid:  # with what the file says
        reason = f"at {fps:g} frames a second: {invalid.reason}"
        raise Invalid(field, frames, reason, invalid.fix) from None
    turn = asking.moment(validation.check_text(f"sentences[{i}]", sentence))
    return [context.example(name, label, "temporal", [turn], targets)]


FORMAT = Format("tacos", "TACoS moments in frames, 2D-TAN JSON", records, parse)
