"""Charades-STA: text lines "VIDEO START END##SENTENCE" in seconds (charades_sta_train.txt)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, text_lines
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

_LINE = re.compile(r"(\S+)\s+([\d.]+)\s+([\d.]+)\s*##(.*)")


def records(context: Context) -> Iterator[Record]:
    return text_lines(context.file)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    match = _LINE.fullmatch(record)
    if match is None:
        raise Invalid("", record, "expected VIDEO START END##SENTENCE", "correct the line")
    video, *ends, sentence = match.groups()
    name = context.find(video, "video")
    try:
        window = [float(v) for v in ends]
    except ValueError as error:
        raise Invalid("window", ends, "expected seconds", "correct the line") from error
    targets = {"windows": [validation.check_window("window", window, math.inf)]}
    turn = asking.moment(validation.check_text("sentence", sentence))
    return [context.example(name, label.replace(" ", ""), "temporal", [turn], targets)]


FORMAT = Format("charades_sta", "Charades-STA moments, text lines", records, parse)
