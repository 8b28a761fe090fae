"""Which source a row of a bucket comes from, and how that may change at a checkpoint.

Every source of a bucket is a sequence of its own: entry 0, 1, 2, ... of its shuffled epochs. The
shares interleave these sequences: row -> (source, position in its sequence), by random access. So
what a source gives, and in which order, does not depend on the other sources.

When sources are added, removed or re-weighted at a checkpoint, rows from there on are interleaved
by the new weights, and each source goes on at the position that it has reached. A source is the
same source while everything but its weight is the same; one that was removed and comes back goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any


@dataclasses.dataclass(frozen=True)
class Share:
    """One source in the rows of one bucket.

    Attributes:
      weight: its share of rows, relative to the others; 0 for one that was removed.
      start: position in its sequence at the first row of the shares.
    """

    weight: float
    start: int = 0


class Shares:
    """Interleaves the sequences of some sources.

    Args:
      shares: by number of the source, at least one with a weight > 0.
      first: first row that these shares decide.
    """

    def __init__(self, shares: Mapping[int, Share], first: int = 0) -> None:
        self.shares, self.first = dict(shares), first
        drawn = [number for number, share in self.shares.items() if share.weight > 0]
        weights = [Fraction(str(self.shares[number].weight)) for number in drawn]
        # (source, its share among itself and those after it)
        self._splits = [
            (number, weights[i] / sum(weights[i:])) for i, number in enumerate(drawn)
        ]

    def __call__(self, row: int) -> tuple[int, int]:
        """(source, position in its sequence) of a row."""
        before, after = self.counts(row), self.counts(row + 1)
        (source,) = (number for number in after if after[number] != before[number])
        return source, before[source]

    def counts(self, row: int) -> dict[int, int]:
        """Position that each source has reached before `row`."""
        if row < self.first:
            raise ValueError(f"row {row}: the sources changed at row {self.first}; start there")
        counts = {number: share.start for number, share in self.shares.items()}
        left = row - self.first
        # Of `left` rows a source takes its part, rounded down, and leaves the rest to the others:
        # with one row more, exactly one source has one more.
        for number, part in self._splits:
            taken = left * part.numerator // part.denominator
            counts[number] += taken
            left -= taken
        return counts


@dataclasses.dataclass(frozen=True)
class SourceTable:
    """Numbers of sources, and the shares of every bucket; JSON in a checkpoint.

    Attributes:
      sources: what a source is (all of its config entry but the weight), by number.
      step: step from which on the shares hold.
      buckets: bucket -> shares.
    """

    sources: tuple[str, ...]
    step: int
    buckets: Mapping[str, Shares]

    def to_json(self) -> dict[str, Any]:
        return {
            "sources": list(self.sources),
            "step": self.step,
            "buckets": {
                name: {
                    "first": shares.first,
                    "shares": [[n, s.weight, s.start] for n, s in shares.shares.items()],
                }
                for name, shares in self.buckets.items()
            },
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SourceTable:
        buckets = {
            name: Shares({n: Share(w, start) for n, w, start in entry["shares"]}, entry["first"])
            for name, entry in saved["buckets"].items()
        }
        return cls(tuple(saved["sources"]), saved["step"], buckets)


def describe(entry: Mapping[str, Any]) -> str:
    """What makes a source the same source, as text: all but its weight."""
    return json.dumps(dict(entry), sort_keys=True)


def number_sources(described: Sequence[str], known: Sequence[str] = ()) -> list[int]:
    """A number for each source: that of the same one in `known`, or the next that is free."""
    free = {number: text for number, text in enumerate(known)}
    numbers, following = [], len(known)
    for text in described:
        number = next((n for n, other in free.items() if other == text), None)
        if number is None:
            number, following = following, following + 1
        else:
            del free[number]
        numbers.append(number)
    return numbers


def change(
    old: SourceTable | None,
    step: int,
    described: Sequence[str],
    weights: Mapping[str, Mapping[int, float]],
    rows: Mapping[str, int],
) -> SourceTable:
    """The table from `step` on.

    Args:
      old: of the checkpoint; None for a new run.
      described: `describe` of each source, in the order of the config.
      weights: bucket -> number of a source with something for it -> weight.
      rows: bucket -> rows that it gave before `step`.

    Returns: `old` itself where the shares are the same.
    """
    known = old.sources if old else ()
    numbers = number_sources(described, known)
    sources = list(known)
    for number, text in sorted(zip(numbers, described, strict=True)):
        if number >= len(known):
            sources.append(text)
    if old and all(
        _drawn(old.buckets[name]) == dict(weights[name]) if name in old.buckets else False
        for name in weights
    ):
        return old
    buckets = {}
    for name, drawn in weights.items():
        before = old.buckets[name].counts(rows[name]) if old and name in old.buckets else {}
        buckets[name] = Shares(
            {n: Share(drawn.get(n, 0.0), before.get(n, 0)) for n in sorted({*before, *drawn})},
            rows[name],
        )
    return SourceTable(tuple(sources), step, buckets)


def _drawn(shares: Shares) -> dict[int, float]:
    return {number: share.weight for number, share in shares.shares.items() if share.weight > 0}
