"""NExT-GQA: questions with five options (val.csv, test.csv, train.csv) and their evidence.

Columns: video_id, frame_count, width, height, question, answer, qid, type, a0..a4. The evidence is
in gsub_val.json beside val.csv: {video: {"duration", "fps", "location": {qid: [[s, e], ...]}}}.
train.csv has none; where another file has none, that is a problem. A row is a multiple-choice
example and, where there is evidence, a temporal one that asks for it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import Context, Format, Record, as_object, load_json, load_text
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

OPTIONS = ("a0", "a1", "a2", "a3", "a4")
COLUMNS = ("video_id", "question", "answer", "qid", "type", *OPTIONS)
WITHOUT_EVIDENCE = "train.csv"
QUESTION = 'When does the video show the answer to this: "{question}?"'
ANSWER = "It is shown at <temporal>."


def records(context: Context) -> Iterator[Record]:
    rows = csv.DictReader(io.StringIO(load_text(context.file), newline=""))
    try:
        yield from _rows(context, rows)
    except csv.Error as error:
        raise Invalid(f"line {rows.line_num}", None, f"not CSV: {error}", "correct it") from error


def _rows(context: Context, rows: csv.DictReader) -> Iterator[Record]:
    context.keys(dict.fromkeys(rows.fieldnames or ()), COLUMNS, ("frame_count", "width", "height"))
    path = context.file.with_name(f"gsub_{context.file.stem}.json")
    evidence = load_json(path, dict) if path.is_file() else {}
    if not path.is_file() and context.file.name != WITHOUT_EVIDENCE:
        yield path.name, Invalid(
            "", None, f"the file with the evidence is missing beside {context.file.name}: its "
            "questions are read without", f"copy it to {path}",
        )  # fmt: skip
    for row in rows:
        label = f"line {rows.line_num}"
        if None in row or None in row.values():
            yield label, Invalid("", row, "it has not one value per column", "quote its commas")
        else:
            yield label, (row, evidence.get(row["video_id"]))


def parse(record: Any, label: str, context: Context) -> list[Example]:
    row, evidence = record
    name = context.find(row["video_id"], "video_id")
    question = validation.check_text("question", row["question"]).rstrip("? ")
    options = tuple(validation.check_text(key, row[key]) for key in OPTIONS)
    answer = validation.check_text("answer", row["answer"])
    key = f"{row['video_id']}_{row['qid']}"
    turn = Turn(f"{question}?", answer, options, row["type"])
    examples = [context.example(name, key, "conversation", [turn], {})]
    windows = _windows(evidence, row["qid"], context)
    if windows:
        turn = Turn(QUESTION.format(question=question), ANSWER, (), row["type"])
        label = f"{key}/evidence"
        examples.append(context.example(name, label, "temporal", [turn], {"windows": windows}))
    return examples


def _windows(evidence: Any, qid: str, context: Context) -> list[list[float]]:
    if evidence is None:
        return []
    context.keys(evidence, ("duration", "location"), ("fps",), "gsub")
    duration = validation.check_number("gsub.duration", evidence["duration"], 1e-3, math.inf, "s")
    field = f"gsub.location.{qid}"
    location = as_object("gsub.location", evidence["location"])
    windows = validation.check_list(field, location.get(qid, []))
    return [
        validation.check_window(f"{field}[{i}]", _not_before_zero(window), duration)
        for i, window in enumerate(windows)
    ]


def _not_before_zero(window: Any) -> Any:
    """Some windows of the test set start at -0.1 or -0.2 s."""
    if isinstance(window, list) and window and isinstance(window[0], float) and -0.25 < window[0]:
        return [max(window[0], 0.0), *window[1:]]
    return window


FORMAT = Format("nextgqa", "NExT-GQA questions with evidence, CSV + gsub JSON", records, parse)
