"""ShareGPT4V: LLaVA's JSON list about images only, `id` and `image` always there.

[{"id", "image", "conversations": [{"from", "value"}]}]. The mixture for instruction
tuning (sharegpt4v_mix665k_...) also holds text alone, which is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpo_jax.data.formats import llava
from tpo_jax.data.formats.reading import Context, Format, Record, load_json
from tpo_jax.data.records import Example, Turn


def records(context: Context) -> Iterator[Record]:
    return ((f"record {i}", r) for i, r in enumerate(load_json(context.file, list)))


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("id", "conversations"), ("image",))
    name, media = llava.find_media(record, context)
    rounds = llava.rounds(record["conversations"], context)
    # One round that asks for a description is a caption; with more it is a conversation.
    kind = "caption" if len(rounds) == 1 else ""
    turns = [Turn(question, answer, (), kind) for _, question, answer in rounds]
    key = llava.example_label(record, label, context)
    return [context.example(name, key, "conversation", turns, {}, media=media)]


FORMAT = Format("sharegpt4v", "ShareGPT4V captions and conversations", records, parse)
