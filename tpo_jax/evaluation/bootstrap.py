"""Scores per item, their mean, and bootstrap intervals that resample whole videos.

Items of one video share its frames, so they are not independent: an interval draws videos with
replacement and keeps all items of a drawn video (a cluster bootstrap, percentile interval).

Some benchmarks pool frames or pixels instead of items: such values are `Weighted`, and a mean is
then that of the pooled ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Weighted(float):
    """A value that counts `weight` (0 or more) times in a mean: of so many frames or pixels."""

    weight: float

    def __new__(cls, value: float, weight: float) -> "Weighted":
        one = super().__new__(cls, value)
        one.weight = float(weight)
        return one


@dataclass(frozen=True)
class ItemScores:
    """The values of one metric: one per item, with the item and the video that it belongs to.

    `weights` are those of `Weighted` values; None where every item counts once.
    """

    items: tuple[str, ...]
    videos: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, float]]) -> "ItemScores":
        """From (item, video, value) rows."""
        items, videos, values, weights = [], [], [], []
        for item, video, value in rows:
            items.append(item)
            videos.append(video)
            values.append(float(value))
            weights.append(value.weight if isinstance(value, Weighted) else None)
        once = all(weight is None for weight in weights)
        weights = None if once else tuple(1.0 if w is None else w for w in weights)
        return cls(tuple(items), tuple(videos), tuple(values), weights)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ItemScores":
        columns = (tuple(value[name]) for name in ("items", "videos", "values"))
        weights = value.get("weights")
        return cls(*columns, None if weights is None else tuple(weights))

    def to_json(self) -> dict[str, Any]:
        values = [round(value, 6) for value in self.values]
        weights = {} if self.weights is None else {"weights": list(self.weights)}
        return {"items": list(self.items), "videos": list(self.videos), "values": values} | weights

    def rows(self) -> Iterator[tuple[str, str, float]]:
        """What `of` reads back."""
        values = self.values
        if self.weights is not None:
            values = map(Weighted, self.values, self.weights)
        return zip(self.items, self.videos, values, strict=True)

    def mean(self) -> float:
        """Of the items, each as often as its weight; where all weights are 0, of the items."""
        if not self.values:
            raise ValueError("scores: the mean of a metric without items is undefined")
        weights = self.weights if any(self.weights or ()) else None
        return float(np.average(self.values, weights=weights))

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Difference:
    """Mean of `after` less that of `before`, over the items that both have, with its interval."""

    value: float
    low: float
    high: float
    items: int


def interval(
    scores: ItemScores, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The (low, high) percentile interval of the mean when videos are drawn with replacement."""
    return _quantiles(_resampled_means(scores, seed, resamples), level)


def paired_difference(
    before: ItemScores,
    after: ItemScores,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """The change of a metric between two models on the same items (one draw of videos for both)."""
    earlier = {item: value for item, _, value in before.rows()}
    later = [row for row in after.rows() if row[0] in earlier]
    if not later:
        raise ValueError("paired difference: the two evaluations share no item; use one test set")
    one = ItemScores.of((item, video, earlier[item]) for item, video, _ in later)
    two = ItemScores.of(later)
    means = _resampled_means(two, seed, resamples) - _resampled_means(one, seed, resamples)
    low, high = _quantiles(means, level)
    return Difference(two.mean() - one.mean(), low, high, len(later))


def _quantiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(scores: ItemScores, seed: int, resamples: int) -> np.ndarray:
    """float64[resamples]: what `ItemScores.mean` gives, for draws of as many videos."""
    if not scores.values:
        raise ValueError("scores: no items to resample")
    names, index = np.unique(scores.videos, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    )
    values = np.asarray(scores.values)

    def totals(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = (np.bincount(index, w, len(names)) for w in (weights * values, weights))
        return tuple(draws @ of_videos for of_videos in both)

    sums, counts = totals(np.ones(len(values)))
    means = sums / counts
    if scores.weights is None:
        return means
    sums, weights = totals(np.asarray(scores.weights))
    return np.divide(sums, weights, out=means, where=weights > 0)
