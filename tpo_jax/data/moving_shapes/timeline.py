"""When everything happens: windows of a plan's events, one after the other.

The whole module counts in ticks of half a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tpo_jax.data.moving_shapes.world import Event

TICKS = 2  # per second
# Lengths in ticks. The few short ones keep a constant window of 4 s from being half right always.
LENGTHS = (3, 4, 4, 5, 5, 6, 6)
EXTRA = 2  # for actions that need longer to be seen
SLOW_ACTIONS = ("hit", "hide", "enter", "leave")


def sample_windows(
    rng: np.random.Generator, events: Sequence[Event], seconds: int
) -> list[tuple[float, float]] | None:
    """Windows in seconds, in order: 1.5 to 4 s long, on half seconds, at least 0.5 s apart.

    One event, the anchor, starts anywhere with equal probability, which decides how many events
    come before it; the others are spread over what is left. Packing all of them at once would crowd
    the two ends of the video, where one constant window would then be right too often. None when
    the draw does not fit.
    """
    lengths = [
        int(rng.choice(LENGTHS)) + (EXTRA if e.action in SLOW_ACTIONS else 0) for e in events
    ]
    gaps = [_gap(a, b) for a, b in zip(events[:-1], events[1:], strict=True)]
    total = seconds * TICKS
    typical = lengths[int(rng.integers(len(events)))]
    start = int(rng.integers(0, total - typical + 1))
    anchor = _anchor_index(rng, len(events), start, total - start - typical)
    if anchor is None or start + lengths[anchor] > total:
        return None
    room = start - (gaps[anchor - 1] if anchor else 0)
    left = _spread(rng, lengths[:anchor][::-1], gaps[: max(anchor - 1, 0)][::-1], room)
    after = start + lengths[anchor] + (gaps[anchor] if anchor + 1 < len(events) else 0)
    right = _spread(rng, lengths[anchor + 1 :], gaps[anchor + 1 :], total - after)
    if left is None or right is None:
        return None
    windows = [
        *((room - e, room - s) for s, e in reversed(left)),
        (start, start + lengths[anchor]),
        *((after + s, after + e) for s, e in right),
    ]
    return [(s / TICKS, e / TICKS) for s, e in windows]


def _gap(before: Event, after: Event) -> int:
    """Ticks of rest between two events; more where only the rest tells them apart."""
    repeats = before.actor == after.actor and before.action == after.action
    return 2 * TICKS if repeats else 1


def _anchor_index(rng: np.random.Generator, count: int, left: int, right: int) -> int | None:
    """How many of the other events come before the anchor: binomial by the room on both sides."""
    least = min(LENGTHS) + 1  # an event and a gap
    chances = np.array(
        [
            math.comb(count - 1, k) * float(left) ** k * float(right) ** (count - 1 - k)
            if k * least <= left and (count - 1 - k) * least <= right
            else 0.0
            for k in range(count)
        ]
    )
    total = chances.sum()
    return int(rng.choice(count, p=chances / total)) if total > 0 else None


def _spread(
    rng: np.random.Generator, lengths: Sequence[int], gaps: Sequence[int], room: int
) -> list[tuple[int, int]] | None:
    """Windows from 0 (beside the anchor) to `room` (the end of the video), in ticks."""
    if not lengths:
        return []
    slack = room - sum(lengths) - sum(gaps)
    if slack < 0:
        return None
    # The cut that is left out keeps windows from sticking to the end of the video.
    cuts = np.sort(rng.integers(0, slack + 1, size=len(lengths) + 1))[:-1]
    windows, packed = [], 0
    for length, gap, cut in zip(lengths, [0, *gaps], cuts, strict=True):
        begin = packed + gap + int(cut)
        windows.append((begin, begin + length))
        packed += gap + length
    return windows
