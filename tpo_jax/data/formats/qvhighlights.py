"""QVHighlights and its family (Charades-STA, TACoS): JSON lines, one query each.

{"qid", "query", "vid", "duration", "relevant_windows": [[s, e], ...] in seconds,
 "relevant_clip_ids"?: 2-second clips, "saliency_scores"?: three raters 0..4 per relevant clip}

A video of 149 s has 74 clips: what is left at the end is none, as the benchmark's program counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, json_lines
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

CLIP_SECONDS = 2.0
HIGHEST_SCORE = 4


def records(context: Context) -> Iterator[Record]:
    return json_lines(context.file)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(
        record,
        ("qid", "query", "vid", "duration", "relevant_windows"),
        ("relevant_clip_ids", "saliency_scores"),
    )
    name = context.find(record["vid"], "vid")
    query = validation.check_text("query", record["query"])
    duration = validation.check_number("duration", record["duration"], 1e-3, math.inf, "seconds")
    windows = validation.check_list("relevant_windows", record["relevant_windows"])
    targets: dict[str, Any] = {
        "windows": [
            validation.check_window(f"relevant_windows[{i}]", window, duration)
            for i, window in enumerate(windows)
        ]
    }
    if record.get("saliency_scores") is not None:
        targets |= _saliency(record, duration)
    label = f"qid{record['qid']}"
    return [context.example(name, label, "temporal", [asking.moment(query)], targets)]


def _saliency(record: Mapping[str, Any], duration: float) -> dict[str, Any]:
    """Mean rating in [0, 1] of every whole 2-second clip; clips that nobody marked are 0."""
    clips = validation.check_list("relevant_clip_ids", record.get("relevant_clip_ids"))
    scores = validation.check_list("saliency_scores", record["saliency_scores"])
    if len(clips) != len(scores):
        raise Invalid(
            "saliency_scores",
            len(scores),
            f"expected one list of ratings per relevant clip, there are {len(clips)} clips",
            "correct them",
        )
    saliency = [0.0] * max(1, int(duration / CLIP_SECONDS))
    for i, (clip, ratings) in enumerate(zip(clips, scores, strict=True)):
        if not isinstance(clip, int) or not 0 <= clip < len(saliency):
            raise Invalid(
                f"relevant_clip_ids[{i}]",
                clip,
                f"a video of {duration:g} s has clips 0..{len(saliency) - 1} of 2 s",
                "correct the clip or the duration",
            )
        if not validation.check_list(f"saliency_scores[{i}]", ratings):
            raise Invalid(f"saliency_scores[{i}]", ratings, "no rating", "add at least one")
        for rating in ratings:
            validation.check_number(f"saliency_scores[{i}]", rating, 0, HIGHEST_SCORE, "")
        saliency[clip] = sum(ratings) / len(ratings) / HIGHEST_SCORE
    return {
        "saliency": saliency,
        "saliency_interval": CLIP_SECONDS,
        "relevant_clip_ids": list(clips),
        "saliency_scores": [list(ratings) for ratings in scores],
    }


FORMAT = Format("qvhighlights", "moment retrieval and highlight JSON lines", records, parse)
