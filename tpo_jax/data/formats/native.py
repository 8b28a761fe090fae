"""Our own schema: one example a line, as in the examples table, plus the path of its media.

See docs/own_data.md. Shortest line: {"video": "a.mp4", "turns": [{"question": "", "answer": ""}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import Context, Format, Record, json_lines
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import FORMAT_VERSION, Example, Turn, known_tasks

OPTIONAL = (
    *("video", "image", "task", "targets", "start", "end", "example_id", "source"),
    *("format_version", "video_id", "media"),  # also in Example.to_json; derived here
)


def records(context: Context) -> Iterator[Record]:
    return json_lines(context.file)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("turns",), OPTIONAL)
    version = record.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise Invalid("format_version", version, f"expected {FORMAT_VERSION}", "convert the file")
    kind = _kind(record)
    name = context.find(record[kind], kind)
    if context.kind(name, kind) != kind:
        raise Invalid(
            kind, record[kind], f"the file is not {kind}", "write it under 'video' or 'image'"
        )
    task = record.get("task", "conversation")
    if task not in known_tasks():
        raise Invalid("task", task, f"expected one of {', '.join(known_tasks())}", "correct it")
    changes: dict[str, Any] = {"media": kind}
    for key in ("start", "end"):
        if record.get(key) is not None:
            changes[key] = validation.check_number(key, record[key], 0, float("inf"), "seconds")
    for key in ("example_id", "source"):
        if key in record:
            changes[key] = validation.check_text(key, record[key])
    targets = record.get("targets", {})
    if not isinstance(targets, Mapping):
        raise Invalid("targets", targets, "expected a JSON object", "write it as {...}")
    turns = [
        _turn(turn, f"turns[{i}]", context)
        for i, turn in enumerate(validation.check_list("turns", record["turns"]))
    ]
    number = label.removeprefix("line ")
    example_label = f"{context.file.stem}/{number}"
    return [context.example(name, example_label, task, turns, targets, **changes)]


def _kind(record: Mapping[str, Any]) -> str:
    kinds = [kind for kind in ("video", "image") if kind in record]
    if len(kinds) != 1:
        raise Invalid(
            "video", record.get("video"), "expected either 'video' or 'image'", "name the file"
        )
    return kinds[0]


def _turn(turn: Any, field: str, context: Context) -> Turn:
    context.keys(turn, ("question", "answer"), ("options", "kind"), field)
    options = validation.check_list(f"{field}.options", turn.get("options", []))
    for i, option in enumerate(options):
        validation.check_text(f"{field}.options[{i}]", option)
    kind = turn.get("kind", "")
    if not isinstance(kind, str):
        raise Invalid(f"{field}.kind", kind, "expected text", "correct it")
    question = validation.check_text(f"{field}.question", turn["question"])
    answer = validation.check_text(f"{field}.answer", turn["answer"])
    return Turn(question, answer, tuple(option.strip() for option in options), kind)


FORMAT = Format("native", "our JSON-lines schema, docs/own_data.md", records, parse)
