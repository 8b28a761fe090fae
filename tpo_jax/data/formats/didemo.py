"""DiDeMo: a JSON list of descriptions, each with the 5-second pieces that several people chose.

[{"annotation_id", "description", "video", "times": [[first, last], ...] pieces, "num_segments",
  "dl_link" or "download_link"}]

The window is the choice of most people (the earliest of several). The videos were cut to 30 seconds
for annotation; the last piece ends with a shorter video.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

PIECE_SECONDS = 5
MOST_PIECES = 6


def records(context: Context) -> Iterator[Record]:
    return ((f"record {i}", r) for i, r in enumerate(load_json(context.file, list)))


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(
        record,
        ("annotation_id", "description", "video", "times", "num_segments"),
        ("dl_link", "download_link"),
    )
    video = validation.check_text("video", record["video"])
    # The names end in the suffix of the upload, or in a bare "."; what is served is mp4.
    name = context.find(video, "video", video.rstrip("."), pathlib.PurePosixPath(video).stem)
    count = validation.check_number("num_segments", record["num_segments"], 1, MOST_PIECES, "")
    choices = [
        _pieces(f"times[{i}]", pieces, int(count))
        for i, pieces in enumerate(validation.check_list("times", record["times"]))
    ]
    if not choices:
        raise Invalid("times", [], "nobody chose a moment", "remove the record")
    votes = collections.Counter(choices)
    first, last = min(votes, key=lambda pieces: (-votes[pieces], pieces))
    end = min((last + 1) * PIECE_SECONDS, context.duration(name, "video"))
    turn = asking.moment(validation.check_text("description", record["description"]))
    targets = {"windows": [[first * PIECE_SECONDS, end]]}
    return [context.example(name, str(record["annotation_id"]), "temporal", [turn], targets)]


def _pieces(field: str, value: Any, count: int) -> tuple[int, int]:
    """(first, last) of a choice."""
    pieces: Sequence[Any] = validation.check_list(field, value)
    good = len(pieces) == 2 and all(type(p) is int for p in pieces)
    if not good or not 0 <= pieces[0] <= pieces[1] < count:
        raise Invalid(
            field, value, f"expected [first, last] of the pieces 0..{count - 1}", "correct it"
        )
    return pieces[0], pieces[1]


FORMAT = Format("didemo", "DiDeMo moments in 5-second pieces", records, parse)
