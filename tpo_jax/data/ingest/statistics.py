"""Counts of a whole table: what is in it, and what was left out."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data.records import Example, IndexEntry
from tpo_jax.data.target_parts import parts


def summarise(
    entries: Sequence[IndexEntry],
    examples: Iterable[Example],
    quarantine: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Counts by task, kind and source, and durations in seconds; JSON-able."""
    infos = [entry.info for entry in entries]
    durations = [info.duration for info in infos if info.media == "video"]
    return {
        "videos": len(durations),
        "images": len(infos) - len(durations),
        "clips": sum(entry.clips[1] for entry in entries),
        "frames": sum(info.num_frames for info in infos),
        "duration": spread(durations),
        **count_examples(examples),
        "quarantined": len(quarantine),
        "quarantined_by_reason": by_reason(quarantine),
    }


def by_reason(problems: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How often each kind of problem occurs, by field and reason."""
    return _counts(_reason(problem) for problem in problems)


def count_examples(examples: Iterable[Example]) -> dict[str, Any]:
    """The part of the statistics that needs no video."""
    tasks, sources, kinds, choices = [], [], [], []
    windows: list[float] = []
    turns = words = boxes = masks = unlabelled = 0
    for example in examples:
        tasks.append(example.task)
        sources.append(example.source)
        for turn in example.turns:
            kinds.append(turn.kind or "(none)")
            choices += [len(turn.options)] if turn.options else []
            words += len(turn.answer.split())
        turns += len(example.turns)
        unlabelled += not example.labelled
        for targets in (one.targets for one in parts(example)):
            pieces = targets.get("windows") or targets.get("segments") or []
            windows += [end - start for start, end in pieces]
            boxes += sum(box is not None for box in targets.get("boxes") or [])
            masks += sum(rle is not None for rle in targets.get("rles") or [])
    return {
        "examples": len(tasks),
        "turns": turns,
        "multiple_choice_turns": len(choices),
        "mean_answer_words": round(words / max(turns, 1), 2),
        "tasks": _counts(tasks),
        "kinds": _counts(kinds),
        "sources": _counts(sources),
        "windows": spread(windows),
        "boxes": boxes,
        "masks": masks,
        "unlabelled": unlabelled,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, smallest, mean, largest and sum of values; empty for none."""
    if not values:
        return {}
    array = np.asarray(values, np.float64)
    figures = {"min": array.min(), "mean": array.mean(), "max": array.max(), "sum": array.sum()}
    return {"count": len(array)} | {name: round(float(v), 3) for name, v in figures.items()}


def table(statistics: Mapping[str, Any]) -> str:
    """Statistics as aligned lines for a terminal."""
    lines = []
    for name, value in statistics.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "-"
        lines.append(f"  {name:24s} {value}")
    return "\n".join(lines)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))


def _reason(entry: Mapping[str, Any]) -> str:
    """Groups reasons that differ only in figures and names: up to the first of ":,;" or digit."""
    words = []
    for word in entry["reason"].split():
        words.append(word.rstrip(":,;"))
        if word.endswith((":", ",", ";")):
            break
        if any(c.isdigit() for c in word):
            words.pop()
            break
    return f"{entry['field'].split('[')[0]}: {' '.join(words)}"
