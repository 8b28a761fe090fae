"""Where everything happens: places and paths on which actors meet only when the plan says so.

Many random layouts are tried at once (A attempts); the first that meets every condition is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tpo_jax.data.moving_shapes.world import DIRECTIONS, EXTENT, GROWTH, Actor, Event

ATTEMPTS = 512
CANDIDATES = 8
REFERENCE_SIZE = 64  # pixels; every length below is for this frame size and scales with it
GAP = 1.5  # between actors that do not meet
BORDER = 1.0
MOVE = (18.0, 28.0)
APPROACH = 12.0  # least visible path before a hit
RECOIL = 5.0
# Radius ranges, by the number of actors and by role.
ORDINARY: dict[int, tuple[float, float]] = {
    1: (7.5, 10.0),
    2: (7.2, 9.0),
    3: (6.8, 8.0),
    4: (6.4, 7.2),
}
SMALL, LARGE = (6.2, 6.8), (9.8, 10.6)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout in pixels.

    start: float[N, 2] places before the first event (for who enters: the place where it arrives).
    radii: float[N].  directions: per event.
    paths: per event (begin[2], target[2], kick[2]): of the actor, and the recoil of who is hit.
    """

    start: np.ndarray
    radii: np.ndarray
    directions: tuple[str | None, ...]
    paths: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]


def find_layout(
    rng: np.random.Generator, actors: Sequence[Actor], events: Sequence[Event], size: int
) -> Layout | None:
    """A layout in which these actors can do all of these, or None when no attempt works."""
    scale = size / REFERENCE_SIZE
    radii = _sample_radii(rng, actors, events) * scale
    reach = radii * [EXTENT[a.form] for a in actors] * _growth(actors, events)
    steps = _sample_steps(rng, events, scale)
    start, good = _sample_starts(rng, events, reach, steps, size, scale)
    search = _Search(events, radii, reach, start, good, size, scale)
    for index, event in enumerate(events):
        search.play(event, steps[:, index])
    return search.first()


def _sample_radii(
    rng: np.random.Generator, actors: Sequence[Actor], events: Sequence[Event]
) -> np.ndarray:
    ranges = [ORDINARY[len(actors)]] * len(actors)
    for event in events:
        if event.action in ("grow", "hide"):
            ranges[event.actor] = SMALL
        if event.action == "hide":
            ranges[event.other] = LARGE
    return np.array([rng.uniform(*r) for r in ranges])


def _growth(actors: Sequence[Actor], events: Sequence[Event]) -> np.ndarray:
    growth = np.ones(len(actors))
    for event in events:
        if event.action == "grow":
            growth[event.actor] = GROWTH
    return growth


def _sample_steps(rng: np.random.Generator, events: Sequence[Event], scale: float) -> np.ndarray:
    """float[A, E, 2]: displacement of every move, zero for other events."""
    steps = np.zeros((ATTEMPTS, len(events), 2))
    for index, event in enumerate(events):
        if event.action == "move":
            length = rng.uniform(*MOVE, size=(ATTEMPTS, 1)) * scale
            steps[:, index] = length * np.array(DIRECTIONS[event.direction])
    return steps


def _sample_starts(
    rng: np.random.Generator,
    events: Sequence[Event],
    reach: np.ndarray,
    steps: np.ndarray,
    size: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Starts float[A, N, 2] apart and inside during all moves, and which attempts hold: bool[A].

    Large actors are placed first, each at the first of some candidates that is free.
    """
    starts = np.zeros((ATTEMPTS, len(reach), 2))
    good = np.ones(ATTEMPTS, bool)
    placed: list[int] = []
    for i in np.argsort(-reach):
        own = [k for k, e in enumerate(events) if e.actor == i]
        travelled = np.cumsum(steps[:, own], axis=1) if own else np.zeros((ATTEMPTS, 1, 2))
        least = BORDER * scale + reach[i] - np.minimum(travelled.min(axis=1), 0)
        most = size - BORDER * scale - reach[i] - np.maximum(travelled.max(axis=1), 0)
        good &= (least <= most).all(axis=1)
        where = rng.random((ATTEMPTS, CANDIDATES, 2))
        where = least[:, None] + where * (most - least)[:, None]
        free = np.ones((ATTEMPTS, CANDIDATES), bool)
        for j in placed:
            far = np.linalg.norm(where - starts[:, None, j], axis=2)
            free &= far >= reach[i] + reach[j] + GAP * scale
        good &= free.any(axis=1)
        starts[:, i] = where[np.arange(ATTEMPTS), free.argmax(axis=1)]
        placed.append(int(i))
    return starts, good


class _Search:
    """Plays a plan on all attempts at once; strikes out those in which something is in the way."""

    def __init__(
        self,
        events: Sequence[Event],
        radii: np.ndarray,
        reach: np.ndarray,
        start: np.ndarray,
        good: np.ndarray,
        size: int,
        scale: float,
    ):
        self.events, self.radii, self.reach = events, radii, reach
        self.start, self.place, self.good = start, start.copy(), good
        self.size, self.scale = size, scale
        self.paths: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def play(self, event: Event, step: np.ndarray) -> None:
        """One event on every attempt. step: float[A, 2]."""
        here = self.place[:, event.actor].copy()
        begin, target, kick = here, here, np.zeros_like(here)
        if event.action == "move":
            target = here + step
            self.place[:, event.actor] = target
        elif event.action in ("enter", "leave"):
            outside = self._outside(here, event)
            begin, target = (outside, here) if event.action == "enter" else (here, outside)
        elif event.action == "hide":
            target = self.place[:, event.other].copy()
        elif event.action == "hit":
            target, kick = self._contact(here, event)
        self._require_free(begin, target, event)
        self.paths.append((begin, target, kick))

    def _outside(self, here: np.ndarray, event: Event) -> np.ndarray:
        """The nearest place beyond the frame on the side of the event."""
        place = here.copy()
        axis = 0 if event.direction in ("left", "right") else 1
        beyond = self.reach[event.actor] + self.scale
        place[:, axis] = -beyond if event.direction in ("left", "up") else self.size + beyond
        return place

    def _contact(self, here: np.ndarray, event: Event) -> tuple[np.ndarray, np.ndarray]:
        """Where the actor touches the other, and the recoil of the other."""
        other = self.place[:, event.other]
        away = other - here
        far = np.linalg.norm(away, axis=1, keepdims=True)
        unit = away / np.maximum(far, 1e-6)
        touch = self.radii[event.actor] + self.radii[event.other]
        self.good &= far[:, 0] >= touch + APPROACH * self.scale
        kick = unit * RECOIL * self.scale
        bound = self.reach[event.other]
        pushed = other + kick
        self.good &= ((pushed >= bound) & (pushed <= self.size - bound)).all(axis=1)
        self._require_free(other, pushed, event)
        return other - unit * touch, kick

    def _require_free(self, begin: np.ndarray, target: np.ndarray, event: Event) -> None:
        """Strikes out attempts in which a third actor is near the segment begin-target."""
        if event.action in ("turn", "grow", "blink"):
            return
        along = target - begin
        length = np.maximum((along**2).sum(axis=1), 1e-9)
        for third in range(len(self.radii)):
            if third in (event.actor, event.other):
                continue
            point = self.place[:, third]
            share = np.clip(((point - begin) * along).sum(axis=1) / length, 0, 1)[:, None]
            distance = np.linalg.norm(point - (begin + share * along), axis=1)
            widest = max(self.reach[i] for i in (event.actor, event.other) if i is not None)
            self.good &= distance >= widest + self.reach[third] + GAP * self.scale

    def first(self) -> Layout | None:
        if not self.good.any():
            return None
        row = int(np.argmax(self.good))
        directions = tuple(e.direction for e in self.events)
        paths = tuple((b[row], t[row], k[row]) for b, t, k in self.paths)
        return Layout(self.start[row], self.radii, directions, paths)
