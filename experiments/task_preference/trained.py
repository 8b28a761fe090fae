"""What a run of an arm was trained on, from what it wrote down."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tpo_jax.training.writers import read_scalars

_EXAMPLES = "train/examples/"


def trained(workdir: pathlib.Path) -> dict[str, Any]:
    """{"steps", "positions", "examples": {kind: questions}} of a run.

    "positions" are those of the decoder in all steps: visual ones, questions and answers, padding
    included. The log has rates alone; positions over steps do not depend on the clock.

    Raises:
      ValueError: metrics.jsonl has no record of a training step.
    """
    file = workdir / "metrics.jsonl"
    records = [record for record in read_scalars(file) if "train/loss" in record]
    if not records:
        raise ValueError(
            f"{file}: no record of a training step, expected one every log_every steps; "
            "train the arm again"
        )
    positions, before = 0.0, 0
    for record in records:
        a_step = record["time/tokens_per_second"] / record["time/steps_per_second"]
        positions += a_step * (record["step"] - before)
        before = record["step"]
    examples = {
        name.removeprefix(_EXAMPLES): count
        for name, count in records[-1].items()
        if name.startswith(_EXAMPLES)
    }
    return {"steps": before, "positions": round(positions), "examples": examples}


def mean_over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of what `trained` gave for each seed; a kind that a seed did not ask counts 0."""
    kinds = sorted({kind for run in runs for kind in run["examples"]})
    count = len(runs)
    return {
        "steps": sum(run["steps"] for run in runs) / count,
        "positions": sum(run["positions"] for run in runs) / count,
        "examples": {
            kind: sum(run["examples"].get(kind, 0) for run in runs) / count for kind in kinds
        },
    }
