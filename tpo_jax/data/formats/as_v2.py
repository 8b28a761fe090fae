"""All-Seeing V2: LLaVA's JSON with boxes in the text.

An object is "<ref>bus</ref><box>[[x1, y1, x2, y2], ...]</box>", a relation "<pred>on</pred>" with
the boxes of its subject and its object, which repeat those of the objects. Numbers are 0..999 of
the image in files with "wo_square_pad" in their name, else of the image padded to a square, as the
original model saw it; the padding is taken off again.

An answer with boxes becomes a region example with one <region> per box of an object; the words of
a relation stay, its boxes do not. A box in a question is written as numbers: [0.10, 0.25, ...].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import llava
from tpo_jax.data.formats.reading import Context, Format, Record
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

SCALE = 999
PLAIN = "wo_square_pad"
_TAGS = re.compile(r"</?(?:ref|pred)>")
_BOXES = re.compile(r"(</(?:ref|pred)>)?\s*((?:<box>.*?</box>\s*)+)", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)


def records(context: Context) -> Iterator[Record]:
    return llava.load_records(context.file)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("conversations",), (*llava.RECORD_KEYS, "height", "width"))
    name, media = llava.find_media(record, context)
    size = None
    if PLAIN not in context.file.name and "<box>" in json.dumps(record["conversations"]):
        size = _size(record, name, context)
    key = llava.example_label(record, label, context)
    talk: list[Turn] = []
    examples = []
    for i, question, answer in llava.rounds(record["conversations"], context):
        field = f"conversations[{i}].value"
        question, _ = _take_boxes(f"conversations[{i - 1}].value", question, size, _as_numbers)
        answer, boxes = _take_boxes(field, answer, size, lambda box: "<region>")
        turn = Turn(question, answer, (), "region" if boxes else "")
        if not boxes:
            talk.append(turn)
            continue
        targets = {"boxes": boxes, "times": [0.0] * len(boxes)}
        examples.append(context.example(name, f"{key}#{i}", "region", [turn], targets, media=media))
    if talk:
        examples.append(context.example(name, key, "conversation", talk, {}, media=media))
    return examples


def _size(record: Any, name: str, context: Context) -> tuple[float, float]:
    if "width" in record and "height" in record:
        return (
            validation.check_number("width", record["width"], 1, 1e6, "pixels"),
            validation.check_number("height", record["height"], 1, 1e6, "pixels"),
        )
    return context.frame_size(name, "width")


def _as_numbers(box: list[float]) -> str:
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def _take_boxes(
    field: str, text: str, size: tuple[float, float] | None, write: Callable[[list[float]], str]
) -> tuple[str, list[list[float]]]:
    """The text with `write` of every box of an object in its place, and these boxes."""
    found: list[list[float]] = []

    def replace(match: re.Match[str]) -> str:
        groups = [_parse(field, inner, size) for inner in _BOX.findall(match[2])]
        space = match[2][len(match[2].rstrip()) :]
        if match[1] == "</pred>":
            return match[1] + space
        boxes = [box for group in groups for box in group]
        found.extend(boxes)
        return (match[1] or "") + "".join(f" {write(box)}" for box in boxes) + space

    text = _BOXES.sub(replace, text)
    if "<box>" in text or "</box>" in text:
        raise Invalid(field, text, "<box> and </box> do not match", "correct the text")
    return _TAGS.sub("", text).strip(), found


def _parse(field: str, inner: str, size: tuple[float, float] | None) -> list[list[float]]:
    """Normalised [x1, y1, x2, y2] of each box of "[[...], ...]"."""
    try:
        boxes = json.loads(inner)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Invalid(field, inner, f"not a list of boxes: {error}", "correct it") from error
    checked = []
    for box in validation.check_list(field, boxes):
        if len(validation.check_list(field, box)) != 4:
            raise Invalid(field, box, "expected [x1, y1, x2, y2]", "write four numbers")
        numbers = [validation.check_number(field, v, 0, 1000, "") / SCALE for v in box]
        checked.append(validation.check_box(field, _unpad(numbers, size) if size else numbers))
    return checked


def _unpad(box: list[float], size: tuple[float, float]) -> list[float]:
    """From the square around the image (size: width, height) to the image, cut at its border."""
    side = max(size)
    unpadded = []
    for k, value in enumerate(box):
        length = size[k % 2]
        padding = (side - length) // 2
        unpadded.append(min(max((value * side - padding) / length, 0.0), 1.0))
    return unpadded


FORMAT = Format("as_v2", "All-Seeing V2 conversations with boxes in the text", records, parse)
