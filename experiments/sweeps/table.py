"""What came out of the runs of a sweep: the last and the best value of every metric, and a CSV."""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.sweeps.runs import Progress, Run, progress
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores
from tpo_jax.training.config import ConfigError
from tpo_jax.training.writers import read_scalars

EVALUATION = "eval.json"  # in a workdir, where `python -m tpo_jax.evaluate --out` put it
# Everything else is a loss, an error or a time.
_HIGHER_IS_BETTER = re.compile(
    r"(accuracy|(^|[/_])m?iou|auc|recall.*|precision|r1@.*|hit@?\d*|map|f1|margin|goodput"
    r"|per_second|j&f|/j|/f|mask/[gc]iou|/ao|sr@.*|lasot_p|lasot_p_norm)$"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run and what it wrote.

    Attributes:
      run, progress: which, and how far.
      curves: {metric: [(step, value), ...]} of metrics.jsonl, values that are finite.
      evaluated: {"eval/" + metric: item scores} of eval.json, if there is one.
    """

    run: Run
    progress: Progress
    curves: Mapping[str, Sequence[tuple[int, float]]]
    evaluated: Mapping[str, ItemScores]

    def final(self, metric: str) -> float | None:
        """The last value."""
        if metric in self.evaluated:
            return self.evaluated[metric].mean()
        points = self.curves.get(metric)
        return points[-1][1] if points else None

    def best(self, metric: str) -> float | None:
        """The best value at any step."""
        if metric in self.evaluated:
            return self.evaluated[metric].mean()
        values = [value for _, value in self.curves.get(metric, ())]
        return (max if higher_is_better(metric) else min)(values) if values else None


def higher_is_better(metric: str) -> bool:
    return bool(_HIGHER_IS_BETTER.search(metric))


def read(run: Run) -> Outcome:
    """What is in the workdir of a run, as far as it has come."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_scalars(run.workdir / "metrics.jsonl"):
        step = record.pop("step")
        for metric, value in record.items():
            if value is not None and math.isfinite(value):
                curves.setdefault(metric, []).append((step, value))
    evaluated = {}
    if (run.workdir / EVALUATION).exists():
        items = results.read_json(run.workdir / EVALUATION)["items"]
        evaluated = {f"eval/{name}": ItemScores.from_json(one) for name, one in items.items()}
    return Outcome(run, progress(run), curves, evaluated)


def metrics_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Every metric of any run: evaluations first, then validation, training, times."""
    names = {name for one in outcomes for name in (*one.evaluated, *one.curves)}
    order = ("eval/", "validation/", "train/")

    def rank(name: str) -> tuple[int, bool, str]:
        group = next((i for i, start in enumerate(order) if name.startswith(start)), len(order))
        return group, not name.endswith("/loss"), name

    return sorted(names, key=rank)


def main_metric(outcomes: Sequence[Outcome], asked: str = "") -> str | None:
    """What runs are compared by: the metric asked for, else the first loss there is.

    Raises:
      ConfigError: no run has the metric asked for.
    """
    names = metrics_of(outcomes)
    if asked and asked not in names:
        raise ConfigError(f"--metric={asked}: no run has it; there are {', '.join(names)}")
    return asked or next((name for name in names if name.endswith("/loss")), None)


def varied_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The options that vary, in the order of the sweep."""
    return list(dict.fromkeys(path for one in outcomes for path in one.run.varied))


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """One line a run: name, state, steps, what varied, last and best value of every metric."""
    varied, metrics = varied_of(outcomes), metrics_of(outcomes)
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    head = ["run", "state", "step", "steps", "goodput", "restarts"]
    both = [f"{name} ({which})" for name in metrics for which in ("final", "best")]
    rows.writerow([*head, *varied, *both])
    for one in outcomes:
        at = one.progress
        values = [value for name in metrics for value in (one.final(name), one.best(name))]
        options = [_cell(one.run.varied.get(path)) for path in varied]
        rows.writerow(
            [one.run.name, at.state, at.step, at.steps, at.goodput, at.restarts, *options, *values]
        )
    return out.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
