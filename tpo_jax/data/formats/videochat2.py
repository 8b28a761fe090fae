"""VideoChat2-IT: a JSON list of {"video" or "image", "QA": [{"i"?, "q", "a"}], "start"?, "end"?}.

Multiple choice is written inside the text there ("Question: ... Options: (A) ... (B) ...", answer
"Answer: (B) ..."); it is taken apart into a question, options and the text of the right option.
Captions have an empty `q`; the instruction `i` is the question then. Elsewhere the release puts the
`i` of the first turn before the video, where all turns see it. Here turns are asked by themselves
and share the video with others, so it stands before each question.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import Context, Format, Record, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

_CHOICES = re.compile(r"\s*Options?:\s*(?=\(A\))", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Z])\)\s*")
_ANSWER = re.compile(r"^(?:Answer:\s*)?\(([A-Z])\)\s*(.*)$", re.IGNORECASE | re.DOTALL)


def records(context: Context) -> Iterator[Record]:
    data = load_json(context.file, list)
    return ((f"record {i}", record) for i, record in enumerate(data))


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("QA",), ("video", "image", "start", "end", "id", "kind"))
    kinds = [kind for kind in ("video", "image") if kind in record]
    if len(kinds) != 1:
        raise Invalid("video", None, "expected either 'video' or 'image'", "name the file")
    name = context.find(record[kinds[0]], kinds[0])
    changes = {
        key: validation.check_number(key, record[key], 0, float("inf"), "seconds")
        for key in ("start", "end")
        if record.get(key) is not None
    }
    qa = validation.check_list("QA", record["QA"])
    turns = [_turn(item, i, context) for i, item in enumerate(qa)]
    turns = [_instructed(turn, item, qa[0]) for turn, item in zip(turns, qa, strict=True)]
    number = label.removeprefix("record ")
    return [
        context.example(
            name,
            f"{context.file.stem}/{number}",
            "conversation",
            turns,
            {},
            media=context.kind(name, kinds[0]),
            **changes,
        )
    ]


def _turn(item: Any, index: int, context: Context) -> Turn:
    field = f"QA[{index}]"
    context.keys(item, ("q", "a"), ("i", "kind"), field)
    question, instruction = item["q"], item.get("i", "")
    for key, text in (("q", question), ("i", instruction)):
        if not isinstance(text, str):
            raise Invalid(f"{field}.{key}", text, "expected text", "correct it")
    answer = validation.check_text(f"{field}.a", item["a"])
    kind = item.get("kind", "")
    if not question.strip():
        return Turn(validation.check_text(f"{field}.q", instruction), answer, (), kind or "caption")
    pieces = _CHOICES.split(question.strip(), maxsplit=1)
    stem = re.sub(r"^Question:\s*", "", pieces[0].strip(), flags=re.IGNORECASE)
    if len(pieces) == 1:
        return Turn(stem, answer, (), kind)
    options = _options(pieces[1], f"{field}.q")
    return Turn(stem, _chosen(answer, options, f"{field}.a"), tuple(options.values()), kind)


def _instructed(turn: Turn, item: Mapping[str, Any], first: Mapping[str, Any]) -> Turn:
    """The turn with its instruction, or that of the first turn, before a question of its own."""
    instruction = item.get("i", "").strip() or first.get("i", "").strip()
    if not instruction or not item["q"].strip():
        return turn
    return dataclasses.replace(turn, question=f"{instruction} {turn.question}")


def _options(text: str, field: str) -> Mapping[str, str]:
    """{"A": "red", ...}; letters must run from A without a gap."""
    parts = _LETTER.split(text.strip())[1:]
    letters, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if letters != [chr(ord("A") + i) for i in range(len(letters))] or not all(texts):
        raise Invalid(
            field, text, "expected options (A) ... (B) ... in order, none empty", "correct them"
        )
    return dict(zip(letters, texts, strict=True))


def _chosen(answer: str, options: Mapping[str, str], field: str) -> str:
    match = _ANSWER.match(answer)
    if match is None:
        if answer in options.values():
            return answer
        raise Invalid(
            field, answer, "expected 'Answer: (letter) text' of one of the options", "correct it"
        )
    letter, text = match.group(1).upper(), match.group(2).strip()
    if letter not in options or (text and text != options[letter]):
        raise Invalid(
            field, answer, f"it disagrees with the options {dict(options)}", "correct the answer"
        )
    return options[letter]


FORMAT = Format("videochat2", "VideoChat2-IT instruction JSON", records, parse)
