"""What the demo has to reach, as data: each target compares one figure with one bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("order", "direction", "counting", "before_after")
LOSS_ALLOWED = 0.03  # of qa/accuracy, from base to stage 3 and from stage 3 to DPO


@dataclasses.dataclass(frozen=True)
class Target:
    """One line of the list: `value` must be at least (or at most) `bound`."""

    name: str
    value: float | None
    bound: float | None
    at_most: bool = False

    @property
    def hit(self) -> bool | None:
        """None where a figure is missing, so that nothing unmeasured counts as reached."""
        if self.value is None or self.bound is None:
            return None
        # Both are rounded figures: a last digit must not decide.
        slack = 1e-9
        if self.at_most:
            return self.value <= self.bound + slack
        return self.value >= self.bound - slack

    def to_json(self) -> dict[str, Any]:
        sign = "<=" if self.at_most else ">="
        return {
            "name": self.name,
            "value": self.value,
            "sign": sign,
            "bound": self.bound,
            "hit": self.hit,
        }


class _Figures:
    """Metrics by stage and floors; a missing figure stays None through arithmetic."""

    def __init__(self, evaluations: Mapping[str, Mapping[str, float]], floors: Mapping[str, float]):
        self._evaluations, self._floors = evaluations, floors

    def at(self, stage: str, metric: str) -> float | None:
        return self._evaluations.get(stage, {}).get(metric)

    def floor(self, metric: str, times: float = 1.0, plus: float = 0.0) -> float | None:
        value = self._floors.get(metric)
        return None if value is None else value * times + plus

    def offset(self, stage: str, metric: str, plus: float) -> float | None:
        value = self.at(stage, metric)
        return None if value is None else value + plus


def check_targets(
    evaluations: Mapping[str, Mapping[str, float]],
    floors: Mapping[str, float],
    counts: Mapping[str, Any],
) -> list[Target]:
    """All targets in the order of the stages.

    Args:
      evaluations: {"base": {metric: value}, "stage1": ..., "stage2", "stage3", "dpo"}.
      floors: {metric: value}.
      counts: as `summary.collect_counts` returns it.
    """
    figures = _Figures(evaluations, floors)
    test, pairs = counts["test"], counts["pairs"]
    return [
        Target("test questions with options", test["questions"], 400),
        Target("test videos they are about", test["videos"], 150),
        Target("pairs for training", pairs.get("train", {}).get("written"), 500),
        Target("pairs held out", pairs.get("test", {}).get("written"), 200),
        Target(
            "floor of temporal/r1@0.5 (constant window)",
            figures.floor("temporal/r1@0.5"),
            0.20,
            at_most=True,
        ),
        *_base(figures),
        *_stage3(figures),
        *_dpo(figures),
    ]


def _base(figures: _Figures) -> Iterator[Target]:
    accuracy = figures.at("base", "qa/accuracy")
    yield Target("base qa/accuracy", accuracy, 0.70)
    yield Target(
        "base qa/accuracy, floor + 0.25", accuracy, figures.floor("qa/accuracy", plus=0.25)
    )
    for kind in KINDS:
        metric = f"qa/accuracy/{kind}"
        bound = figures.floor(metric, plus=0.10)
        yield Target(f"base {metric}, floor + 0.10", figures.at("base", metric), bound)


def _stage3(figures: _Figures) -> Iterator[Target]:
    recall = figures.at("stage3", "temporal/r1@0.5")
    yield Target("stage3 temporal/r1@0.5", recall, 0.50)
    yield Target(
        "stage3 temporal/r1@0.5, 3 x floor", recall, figures.floor("temporal/r1@0.5", times=3)
    )
    for metric, bound in (("region/acc@0.5", 0.60), ("mask/j", 0.55)):
        yield Target(f"stage3 {metric}", figures.at("stage3", metric), bound)
    for metric in ("highlight/hit@1", "mask/f", "tracking/auc"):
        bound = figures.floor(metric, times=1.5)
        yield Target(f"stage3 {metric}, 1.5 x floor", figures.at("stage3", metric), bound)
    yield Target(
        f"stage3 qa/accuracy, base - {LOSS_ALLOWED}",
        figures.at("stage3", "qa/accuracy"),
        figures.offset("base", "qa/accuracy", -LOSS_ALLOWED),
    )


def _dpo(figures: _Figures) -> Iterator[Target]:
    accuracy = figures.at("dpo", "preference/accuracy")
    yield Target("dpo preference/accuracy", accuracy, 0.75)
    blind = figures.offset("dpo", "preference/accuracy_blind", 0.15)
    yield Target("dpo preference/accuracy, blind + 0.15", accuracy, blind)
    yield Target(
        f"dpo qa/accuracy, stage3 - {LOSS_ALLOWED}",
        figures.at("dpo", "qa/accuracy"),
        figures.offset("stage3", "qa/accuracy", -LOSS_ALLOWED),
    )
