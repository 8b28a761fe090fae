"""Is one setting better than another, or was it the seed? Paired over what both have in common.

Runs that differ in nothing but the seed are one setting. Two settings are compared on the seeds
that both have: the mean of the differences, its bootstrap interval over seeds, and the exact
probability of a mean at least as far from 0 if the sign of every difference were a coin toss
(Fisher's sign-flip test). With n seeds it cannot be below 2 / 2^n: three seeds never reach 0.05.
Scores of evaluations are paired by item as well, and the interval draws whole videos.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.sweeps.table import Outcome
from tpo_jax.evaluation.bootstrap import Difference, ItemScores, paired_difference

MOST_SEEDS = 14  # all 2^n sign patterns up to here, as many random ones beyond
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A setting against the first one of the sweep.

    Attributes:
      setting: what varied, without the seed.
      metric: compared.
      difference: mean of (setting - first) and its 95 % interval; `items` counts pairs.
      seeds: that both settings have.
      p: sign-flip probability over seeds; None for one seed.
      corrected: the same after Holm's correction for all comparisons of this metric.
    """

    setting: Mapping[str, Any]
    metric: str
    difference: Difference
    seeds: int
    p: float | None
    corrected: float | None = None

    @property
    def significant(self) -> bool:
        return self.corrected is not None and self.corrected < LEVEL


def settings_of(outcomes: Sequence[Outcome]) -> list[tuple[dict[str, Any], list[Outcome]]]:
    """[(what varied without the seed, its runs)], in the order of the sweep."""
    groups: dict[str, tuple[dict[str, Any], list[Outcome]]] = {}
    for one in outcomes:
        setting = {path: value for path, value in one.run.varied.items() if path != "seed"}
        groups.setdefault(json.dumps(setting), (setting, []))[1].append(one)
    return list(groups.values())


def compare(outcomes: Sequence[Outcome], metric: str) -> list[Comparison]:
    """Every setting against the first, on finished runs; settings without a common seed are left
    out."""
    finished = [one for one in outcomes if one.progress.state == "finished"]
    settings = settings_of(finished)
    found = []
    for setting, runs in settings[1:]:
        before, after = _by_seed(settings[0][1], metric), _by_seed(runs, metric)
        common = sorted(before.keys() & after.keys())
        if not common:
            continue
        difference = paired_difference(
            _pool(before, common, metric), _pool(after, common, metric)
        )
        changes = [after[s].final(metric) - before[s].final(metric) for s in common]
        p = sign_flip(changes) if len(common) > 1 else None
        found.append(Comparison(setting, metric, difference, len(common), p))
    return _holm(found)


def sign_flip(changes: Sequence[float]) -> float:
    """Share of the 2^n sign patterns whose mean is at least as far from 0 (two-sided)."""
    changes = np.asarray(changes, np.float64)
    if len(changes) <= MOST_SEEDS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(changes))))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (2**MOST_SEEDS, len(changes)))
        signs[0] = 1.0  # the one that was seen
    means = np.abs(signs @ changes)
    return float(np.mean(means >= abs(changes.sum()) - 1e-12 * np.abs(changes).sum()))


def _by_seed(runs: Sequence[Outcome], metric: str) -> dict[int, Outcome]:
    return {one.run.config["seed"]: one for one in runs if one.final(metric) is not None}


def _pool(runs: Mapping[int, Outcome], seeds: Sequence[int], metric: str) -> ItemScores:
    """One score a seed; of an evaluation one an item and seed, kept together by video."""
    rows: list[tuple[str, str, float]] = []
    for seed in seeds:
        scores = runs[seed].evaluated.get(metric)
        if scores is None:
            rows.append((str(seed), str(seed), runs[seed].final(metric)))
        else:
            rows += [(f"{seed}/{item}", video, value) for item, video, value in scores.rows()]
    return ItemScores.of(rows)


def _holm(found: Sequence[Comparison]) -> list[Comparison]:
    """Adds Holm-corrected probabilities."""
    tested = sorted((c for c in found if c.p is not None), key=lambda c: c.p)
    corrected: dict[int, float] = {}
    worst = 0.0
    for rank, one in enumerate(tested):
        worst = max(worst, min(1.0, one.p * (len(tested) - rank)))
        corrected[id(one)] = worst
    return [dataclasses.replace(c, corrected=corrected.get(id(c))) for c in found]
