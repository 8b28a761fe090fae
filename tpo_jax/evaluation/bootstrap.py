"""Scores per item, their mean, and bootstrap intervals that resample whole videos.

Items of one video share its frames, so they are not independent: an interval draws videos with
replacement and keeps all items of a drawn video (a cluster bootstrap, percentile interval).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class ItemScores:
    """The values of one metric: one per item, with the item and the video that it belongs to."""

    items: tuple[str, ...]
    videos: tuple[str, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, float]]) -> "ItemScores":
        """From (item, video, value) rows."""
        items, videos, values = [], [], []
        for item, video, value in rows:
            items.append(item)
            videos.append(video)
            values.append(float(value))
        return cls(tuple(items), tuple(videos), tuple(values))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ItemScores":
        return cls(tuple(value["items"]), tuple(value["videos"]), tuple(value["values"]))

    def to_json(self) -> dict[str, Any]:
        values = [round(value, 6) for value in self.values]
        return {"items": list(self.items), "videos": list(self.videos), "values": values}

    def mean(self) -> float:
        if not self.values:
            raise ValueError("scores: the mean of a metric without items is undefined")
        return float(np.mean(self.values))

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Difference:
    """Mean of `after - before` over the items that both have, with its interval."""

    value: float
    low: float
    high: float
    items: int


def interval(
    scores: ItemScores, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The (low, high) percentile interval of the mean when videos are drawn with replacement."""
    means = _resampled_means(scores, seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    before: ItemScores,
    after: ItemScores,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """The change of a metric between two models on the same items (one draw of videos for both)."""
    earlier = dict(zip(before.items, before.values, strict=True))
    rows = [
        (item, video, value - earlier[item])
        for item, video, value in zip(after.items, after.videos, after.values, strict=True)
        if item in earlier
    ]
    if not rows:
        raise ValueError("paired difference: the two evaluations share no item; use one test set")
    change = ItemScores.of(rows)
    low, high = interval(change, seed=seed, resamples=resamples, level=level)
    return Difference(change.mean(), low, high, len(change))


def _resampled_means(scores: ItemScores, seed: int, resamples: int) -> np.ndarray:
    """float64[resamples]: sum of values over number of items, for draws of as many videos."""
    if not scores.values:
        raise ValueError("scores: no items to resample")
    names, index = np.unique(scores.videos, return_inverse=True)
    sums = np.bincount(index, weights=scores.values, minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    )
    return (draws @ sums) / (draws @ counts)
