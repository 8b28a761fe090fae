"""The files of an evaluation: metrics with intervals, item scores, samples, floors.

FILE.json           metrics, intervals, counts, routing, and every item's score (for paired tests)
FILE.samples.jsonl  predictions of single items, which the report draws
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from tpo_jax.data import files
from tpo_jax.errors import MissingFile, UserError
from tpo_jax.evaluation import floors as floors_module
from tpo_jax.evaluation.bootstrap import ItemScores, interval

FORMAT_VERSION = 1


def evaluation_record(
    scores: Mapping[str, ItemScores],
    *,
    routing: Mapping[str, Mapping[str, int]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON of one evaluation."""
    if not scores and not about["unlabelled"]:
        raise UserError(f"{about['data']}: no question of tasks {about['tasks']}; nothing scored")
    return {
        "format_version": FORMAT_VERSION,
        **about,
        "metrics": {metric: round(s.mean(), 6) for metric, s in scores.items()},
        "intervals": {
            metric: [round(edge, 6) for edge in interval(s)] for metric, s in scores.items()
        },
        "counts": {
            metric: {"items": len(s), "videos": len(set(s.videos))} for metric, s in scores.items()
        },
        "routing": {task: dict(counts) for task, counts in routing.items()},
        "items": {metric: s.to_json() for metric, s in scores.items()},
    }


def floors_record(found: floors_module.Floors, **about: str) -> dict[str, Any]:
    """The JSON of the floors: the best value of each metric, and what was tried."""
    return {
        "format_version": FORMAT_VERSION,
        **about,
        "floors": {m: round(value, 6) for m, value in floors_module.best(found).items()},
        "candidates": {
            metric: [
                {
                    "name": c.name,
                    "train": None if math.isnan(c.train) else round(c.train, 6),
                    "test": round(c.test, 6),
                }
                for c in candidates
            ]
            for metric, candidates in found.items()
        },
    }


def write_json(path: epath.PathLike, record: Mapping[str, Any]) -> None:
    """Writes under a temporary name, then renames."""
    files.write(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_floors(path: epath.PathLike, data: str) -> dict[str, float]:
    """{metric: floor} of a floors file, which has to be of the split `data`."""
    record = read_json(path)
    if "floors" not in record or "candidates" not in record:
        raise UserError(f"{path}: no floors; write them with `evaluate --floors_from`")
    if epath.Path(record["data"]) != epath.Path(data):
        raise UserError(
            f"{path}: floors of {record['data']}, expected those of {data}; compute them for it"
        )
    return record["floors"]


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads an evaluation or floors file, refusing another format version."""
    path = epath.Path(path)
    if not path.exists():
        raise MissingFile(f"{path}: missing; write it with `python -m tpo_jax.evaluate`")
    record = json.loads(path.read_text())
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {record.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "evaluate again with this version"
        )
    return record


def samples_path(path: epath.PathLike) -> epath.Path:
    """runs/eval/stage3.json -> runs/eval/stage3.samples.jsonl."""
    path = epath.Path(path)
    return path.with_name(f"{path.stem}.samples.jsonl")


def write_samples(path: epath.PathLike, samples: Iterable[Mapping[str, Any]]) -> None:
    files.write(samples_path(path), "".join(json.dumps(sample) + "\n" for sample in samples))


def read_samples(path: epath.PathLike) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples_path(path).read_text().splitlines()]


def format_metrics(record: Mapping[str, Any]) -> str:
    """One line per metric: value, floor if known, interval, numbers of items and of the videos and
    still images together that they are about (`counts` calls both videos).

    Videos are what is drawn, so one alone has no interval.
    """
    floors = record["floors"]
    lines = [
        f"{'metric':32s} {'value':>7s}{'   floor' if floors else ''}  {'95 % interval':>16s}  "
        f"{'items':>6s} {'videos/images':>13s}"
    ]
    for metric, value in record["metrics"].items():
        low, high = record["intervals"][metric]
        count = record["counts"][metric]
        between = f"[{low:6.3f}, {high:6.3f}]" if count["videos"] > 1 else "-"
        floor = f" {floors[metric]:7.3f}" if metric in floors else " " * 8
        lines.append(
            f"{metric:32s} {value:7.3f}{floor if floors else ''}  {between:>16s}  "
            f"{count['items']:6d} {count['videos']:13d}"
        )
    for task, counts in record["routing"].items():
        parts = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines.append(f"routing of {task}: {parts}")
    return "\n".join(lines)


def format_frames(record: Mapping[str, Any]) -> str:
    """One line per task: how many annotated frames are scored, and what to do about the others."""
    lines = []
    for task, count in record["frames_of_masks"].items():
        for wanted, done in (("annotated", "scored"), ("asked", "answered")):
            if wanted not in count:
                continue
            line = f"frames of {task}: {count[done]} of {count[wanted]} {wanted} are {done}"
            if count[done] < count[wanted]:
                line += (
                    f"; the others are not stored in {record['data']}: prepare it with --fps of "
                    "the annotations' rate"
                )
            lines.append(line)
    return "\n".join(lines)


def format_sizes(record: Mapping[str, Any]) -> str:
    """A line where tracks are not in `tracking/lasot_p`, because nothing says their pixels."""
    counts, none = record["counts"], {"items": 0}
    tracks = counts.get("tracking/auc", none)["items"]
    sized = counts.get("tracking/lasot_p", none)["items"]
    if sized == tracks:
        return ""
    return (
        f"tracking/lasot_p, in pixels: {sized} of {tracks} tracks say the size of their frames; "
        'prepare LaSOT or GOT-10k again, or give targets "size"\n'
    )


def format_unlabelled(record: Mapping[str, Any]) -> str:
    """One line per task that has examples without labels."""
    return "".join(
        f"{count} of {task} are unlabelled: answered, in no metric\n"
        for task, count in record["unlabelled"].items()
    )


def format_floors(record: Mapping[str, Any]) -> str:
    """One line per candidate, the best of each metric marked."""
    lines = [f"{'floor':28s} {'test':>7s} {'train':>7s}  chosen on the training split"]
    for metric, candidates in record["candidates"].items():
        for candidate in sorted(candidates, key=lambda c: -c["test"]):
            train = "" if candidate["train"] is None else f"{candidate['train']:.3f}"
            lines.append(f"{metric:28s} {candidate['test']:7.3f} {train:>7s}  {candidate['name']}")
    return "\n".join(lines)
