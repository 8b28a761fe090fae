"""summary.json of a run: everything that was measured, in one file, and its table.

The run folder holds what the commands wrote:

    eval/<stage>.json            `evaluate` of base, stage1, stage2, stage3 and dpo
    eval/<stage>_preference.json the same model on pairs that were generated later (optional)
    eval/floors.json             `evaluate --floors_from`
    floor_<evidence>/            what `train` wrote of the floors that are models
    data/<split>/statistics.json `prepare run`
    pairs/<split>/counts.json    `preferences generate`
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

import tpo_jax
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores, paired_difference
from tpo_jax.evaluation.targets import check_targets

STAGES = ("base", "stage1", "stage2", "stage3", "dpo")
# Of the table, in its order, kinds of question after QUESTIONS; the rest is in the file.
QUESTIONS = ("qa/accuracy", "qa/accuracy_videos")
BLIND = "preference/accuracy_blind"
SHOWN = (
    *QUESTIONS, "temporal/r1@0.3", "temporal/r1@0.5", "temporal/r1@0.7", "temporal/miou",
    "highlight/map", "highlight/hit@1", "region/acc@0.5", "mask/j", "mask/f", "mask/j&f",
    "tracking/auc", "preference/accuracy", BLIND,
)  # fmt: skip
# How far a floor that is a model was trained, at each of its validations.
LEARNT = ("train/loss", "validation/loss", "validation/answer_accuracy")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def assemble(
    run_dir: epath.PathLike,
    *,
    seed: int,
    seconds: Mapping[str, float],
    cpu_seconds: Mapping[str, float],
    wall_seconds: float,
    max_abs_difference: float | None,
) -> dict[str, Any]:
    """Collects what the commands left in a run folder.

    Args:
      run_dir: the run folder.
      seed: of the run.
      seconds: {step: seconds}.
      cpu_seconds: {step: seconds of processor time}.
      wall_seconds: of all steps; less than their sum where some ran beside others.
      max_abs_difference: import(export(model)) against the model, over all leaves.
    """
    run_dir = epath.Path(run_dir)
    records = {stage: found for stage in STAGES if (found := _evaluation(run_dir, stage))}
    floors = results.read_json(run_dir / "eval" / "floors.json")
    evaluations = {stage: record["metrics"] for stage, record in records.items()}
    lowest = floors["floors"] | preference_floors(evaluations)
    counts = collect_counts(run_dir, records)
    targets = check_targets(evaluations, lowest, counts)
    return {
        "seed": seed,
        "device": describe_device(),
        "versions": versions(),
        "seconds": dict(seconds),
        "cpu_seconds": dict(cpu_seconds),
        "wall_seconds": wall_seconds,
        "floors": lowest,
        "floor_candidates": floors["candidates"],
        "floor_training": floor_training(run_dir),
        "eval": evaluations,
        "intervals": {stage: record["intervals"] for stage, record in records.items()},
        "changes": changes(records),
        "routing": {stage: record["routing"] for stage, record in records.items()},
        "counts": counts,
        "export": {"max_abs_difference": max_abs_difference},
        "targets": [target.to_json() for target in targets],
    }


def preference_floors(evaluations: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the last stage reaches on its pairs with the video hidden, under both keys of pairs."""
    blind = [found[BLIND] for found in evaluations.values() if BLIND in found]
    return dict.fromkeys(("preference/accuracy", BLIND), blind[-1]) if blind else {}


def changes(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"stage3 - base": {metric: {value, low, high, items}}}: paired, over the same items."""
    out: dict[str, dict[str, Any]] = {}
    for before, after in (("base", "stage3"), ("stage3", "dpo")):
        if before in records and after in records:
            earlier, later = records[before]["items"], records[after]["items"]
            rows = {}
            for metric in sorted(earlier.keys() & later.keys()):
                one, two = (ItemScores.from_json(items[metric]) for items in (earlier, later))
                change = paired_difference(one, two)
                rows[metric] = {
                    "value": round(change.value, 6),
                    "interval": [round(change.low, 6), round(change.high, 6)],
                    "items": change.items,
                }
            out[f"{after} - {before}"] = rows
    return out


def floor_training(run_dir: epath.Path) -> dict[str, dict[str, Any]]:
    """{"floor_blind": {"steps", "chosen_step", "validations": [{"step", *LEARNT}, ...]}}.

    Whether a floor had learnt what it can: a figure that still rises between the middle and the end
    of the training says that the floor is too low. `chosen_step` is that of the weights that were
    evaluated on the test split, those of the lowest validation loss.
    """
    found = {}
    for ledger in sorted(run_dir.glob("floor_*/ledger.json")):
        ended = json.loads(ledger.read_text())
        lines = (ledger.parent / "metrics.jsonl").read_text().splitlines()
        by_step: dict[int, dict[str, float]] = {}
        for record in map(json.loads, lines):
            figures = {name: round(record[name], 6) for name in LEARNT if name in record}
            by_step.setdefault(record["step"], {}).update(figures)
        found[ledger.parent.name] = {
            "steps": ended["step"],
            "chosen_step": ended["best"]["step"],
            "validations": [
                {"step": step, **{name: figures.get(name) for name in LEARNT}}
                for step, figures in sorted(by_step.items())
                if "validation/loss" in figures
            ],
        }
    return found


def collect_counts(run_dir: epath.Path, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"data": {split: statistics}, "pairs": {split: counts}, "test": {questions, videos, images}}.

    Counted in "test" is what questions with options are about.
    """
    none = {"items": 0, "videos": 0}
    counts = next((r["counts"] for r in records.values() if "qa/accuracy" in r["counts"]), {})
    questions = counts.get("qa/accuracy", none)
    videos = counts.get("qa/accuracy_videos", none)["videos"]
    return {
        "data": _by_split(run_dir / "data", "statistics.json"),
        "pairs": _by_split(run_dir / "pairs", "counts.json"),
        "test": {
            "questions": questions["items"],
            "videos": videos,
            "images": questions["videos"] - videos,
        },
    }


def describe_device() -> str:
    """For example "8 x TPU v5 lite" or "cpu (x86_64, 2 cores)": those that this process may use."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if len(devices) > 1:
        return f"{len(devices)} x {kind}"
    return f"{kind} ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)"


def versions() -> dict[str, str]:
    """{package: version} of what decides the numbers."""
    found = {"tpo_jax": tpo_jax.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def write_summary(run_dir: epath.PathLike, summary: Mapping[str, Any]) -> epath.Path:
    """Writes run_dir/summary.json and returns its path."""
    path = epath.Path(run_dir) / "summary.json"
    results.write_json(path, summary)
    return path


def format_table(summary: Mapping[str, Any]) -> str:
    """Metrics by stage beside their floors, then every target with what was measured."""
    stages = [stage for stage in STAGES if stage in summary["eval"]]
    lines = [f"{'':28s} {'floor':>7s}" + "".join(f" {stage:>7s}" for stage in stages)]
    kinds = sorted(m for m in summary["eval"].get("base", {}) if m.startswith("qa/accuracy/"))
    for metric in (*QUESTIONS, *kinds, *SHOWN[len(QUESTIONS) :]):
        values = [summary["eval"][stage].get(metric) for stage in stages]
        if any(value is not None for value in values):
            cells = [summary["floors"].get(metric), *values]
            lines.append(f"{metric:28s} " + " ".join(_cell(value) for value in cells))
    lines += [*_format_floor_training(summary), "", "targets"]
    for target in summary["targets"]:
        word = {True: "hit", False: "MISSED", None: "not measured"}[target["hit"]]
        measured = f"{_cell(target['value'])} {target['sign']} {_cell(target['bound'])}"
        lines.append(f"  {word:12s} {measured}   {target['name']}")
    hits = sum(target["hit"] is True for target in summary["targets"])
    lines.append(f"  {hits} of {len(summary['targets'])} targets hit")
    return "\n".join(lines)


def _format_floor_training(summary: Mapping[str, Any]) -> list[str]:
    """What the floors that are models got right on validation, step by step."""
    if not summary["floor_training"]:
        return []
    lines = ["", "floors that are models: validation questions answered word for word"]
    for name, trained in summary["floor_training"].items():
        figures = ", ".join(
            f"{_cell(at['validation/answer_accuracy']).strip()} at step {at['step']}"
            for at in trained["validations"]
        )
        lines.append(f"  {name:26s} {figures}; chosen: step {trained['chosen_step']}")
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>7s}"
    return f"{value:7d}" if isinstance(value, int) else f"{value:7.3f}"


def _evaluation(run_dir: epath.Path, stage: str) -> dict[str, Any] | None:
    """The evaluation of a stage, with that of its pairs when it was made apart."""
    path = run_dir / "eval" / f"{stage}.json"
    if not path.exists():
        return None
    record = results.read_json(path)
    extra = run_dir / "eval" / f"{stage}_preference.json"
    if extra.exists():
        other = results.read_json(extra)
        for part in ("metrics", "intervals", "counts", "items"):
            record[part] = {**other[part], **record[part]}
    return record


def _by_split(folder: epath.Path, name: str) -> dict[str, Any]:
    """{split: JSON} of folder/<split>/name."""
    files = sorted(folder.glob(f"*/{name}")) if folder.exists() else []
    return {file.parent.name: json.loads(file.read_text()) for file in files}
