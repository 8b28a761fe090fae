"""LLaVA and LLaVA-Video: a JSON list (or JSON lines) of conversations, or a YAML mixture of such.

{"id"?, "image" or "video", "conversations": [{"from": "human", "value": "<image>\\n..."},
 {"from": "gpt", "value": "..."}, ...], "data_source"?}

A mixture (.yaml) is {"datasets": [{"json_path", "sampling_strategy"?}], "seed"?}; a path is
relative to the mixture and stays inside its folder. A strategy is "all" (default) or first:N,
end:N, random:N, where N is a number of records or a percentage ("10%", rounded up). What random
takes depends on `seed` (0) and the place of the entry alone; it keeps the order of the file.
"""

from __future__ import annotations

import math
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from tpo_jax.data import validation
from tpo_jax.data.formats.reading import (
    Context,
    Format,
    Record,
    expand,
    inside,
    json_lines,
    load_json,
    load_text,
)
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn

RECORD_KEYS = ("id", "image", "video", "data_source")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_PLACE = re.compile(r"\s*<(?:image|video)>\s*")
_STRATEGY = re.compile(r"(first|end|random):(\d+)(%?)")


def records(context: Context) -> Iterator[Record]:
    if context.file.suffix not in (".yaml", ".yml"):
        return load_records(context.file)
    mixture = _load_yaml(context)
    context.keys(mixture, ("datasets",), ("seed",))
    seed = mixture.get("seed", 0)
    if type(seed) is not int:
        raise Invalid("seed", seed, "expected a whole number", "correct it")
    datasets = validation.check_list("datasets", mixture["datasets"])

    def sampled(field: str, entry: Any) -> Iterator[Record]:
        context.keys(entry, ("json_path",), ("sampling_strategy",), field)
        path = inside(context.file.parent, entry["json_path"], f"{field}.json_path")
        strategy = entry.get("sampling_strategy", "all")
        found = list(load_records(path))
        for i in _chosen(f"{field}.sampling_strategy", strategy, len(found), f"{seed} {field}"):
            label, record = found[i]
            yield f"{field} {entry['json_path']} {label}", record

    return expand(((f"datasets[{i}]", entry) for i, entry in enumerate(datasets)), sampled)


def load_records(path: pathlib.Path) -> Iterator[Record]:
    """(label, record) of a JSON list or of JSON lines."""
    if path.suffix == ".jsonl":
        return json_lines(path)
    return ((f"record {i}", record) for i, record in enumerate(load_json(path, list)))


def _load_yaml(context: Context) -> Any:
    try:
        return yaml.safe_load(load_text(context.file))
    except yaml.YAMLError as error:
        raise Invalid("", None, f"not YAML: {error}", "correct it") from error


def _chosen(field: str, strategy: Any, count: int, seed: str) -> Sequence[int]:
    """Indices of the records that a strategy takes, rising."""
    if strategy == "all":
        return range(count)
    match = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
    if match is None:
        raise Invalid(
            field,
            strategy,
            "expected all, or first:N, end:N or random:N with N a number or a percentage",
            "correct it",
        )
    kind, number, percent = match.groups()
    wanted = math.ceil(int(number) * count / 100) if percent else int(number)
    wanted = min(wanted, count)
    if kind == "random":
        return sorted(random.Random(seed).sample(range(count), wanted))
    return range(wanted) if kind == "first" else range(count - wanted, count)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    context.keys(record, ("conversations",), RECORD_KEYS)
    name, media = find_media(record, context)
    turns = [Turn(*texts) for _, *texts in rounds(record["conversations"], context)]
    key = example_label(record, label, context)
    return [context.example(name, key, "conversation", turns, {}, media=media)]


def example_label(record: Mapping[str, Any], label: str, context: Context) -> str:
    """Unique also where ids are missing or used twice, as in published mixtures."""
    number = label.replace("record ", "").replace("line ", "")
    return f"{context.file.stem}/{number}" + (f"/{record['id']}" if record.get("id") else "")


def find_media(record: Mapping[str, Any], context: Context) -> tuple[str, str]:
    """(media file, "image" or "video") of a record."""
    kinds = [kind for kind in ("image", "video") if record.get(kind) not in (None, [], "")]
    if len(kinds) != 1:
        found = "both" if kinds else "neither: it is text alone"
        raise Invalid("image, video", None, f"expected one of them, there is {found}", "remove it")
    (kind,) = kinds
    name = record[kind]
    if isinstance(name, list):
        if len(name) > 1:
            raise Invalid(kind, name, f"{len(name)} files; expected one", "remove the record")
        (name,) = name
    found = context.find(name, kind)
    return found, context.kind(found, kind)


def rounds(conversations: Any, context: Context) -> list[tuple[int, str, str]]:
    """(index, question, answer) of each round, without the place of the image in the text.

    A system message goes before the first question.
    """
    found: list[tuple[int, str, str]] = []
    question, system = "", ""
    expected = "human"
    for i, item in enumerate(validation.check_list("conversations", conversations)):
        field = f"conversations[{i}]"
        who, what = ("role", "content") if _is_role(item) else ("from", "value")
        context.keys(item, (who, what), (), field)
        speaker = ROLES.get(item[who]) if isinstance(item[who], str) else None
        text = validation.check_text(f"{field}.{what}", item[what])
        if speaker == "system" and i == 0:
            system = f"{text}\n"
        elif speaker != expected:
            raise Invalid(
                f"{field}.{who}", item[who], f"expected {expected} here", "correct the order"
            )
        elif speaker == "human":
            if len(_PLACE.findall(text)) > 1:
                raise Invalid(f"{field}.{what}", text, "several images", "remove the record")
            question = _PLACE.sub("\n", text).strip()
            question = validation.check_text(f"{field}.{what}", question)
            expected = "gpt"
        else:
            found.append((i, system + question, text))
            system, expected = "", "human"
    if expected == "gpt":
        raise Invalid("conversations", question, "the last question has no answer", "add it")
    return found


def _is_role(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item


FORMAT = Format("llava", "LLaVA / LLaVA-Video conversations, JSON or YAML mixture", records, parse)
