"""From a seed to a scene: plan, timeline, layout, and the state of every actor in every frame."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tpo_jax.data.moving_shapes.layout import Layout, find_layout
from tpo_jax.data.moving_shapes.plan import Plan, sample_cast, sample_plan
from tpo_jax.data.moving_shapes.timeline import sample_windows
from tpo_jax.data.moving_shapes.world import (
    GROWTH,
    TURNING_FORMS,
    Actor,
    CountTheme,
    Event,
    WorldConfig,
)

# A turn ends on a multiple of this, at about 90 degrees per second: 45 between the frames of a
# model that sees 2 per second, where a square becomes a diamond.
QUARTER = 90.0
IMAGE_SHARED_COLOUR = 0.3  # share of images in which two shapes have one colour
BLINK_PERIOD = 1.0  # seconds
# Share of a period that is white: more than half, so that sampling at 1 fps meets white as well.
BLINK_SHARE = 0.625
TRIES_PER_PLAN = 12  # before another plan with one event less is drawn


@dataclasses.dataclass(frozen=True)
class States:
    """Motion of N actors over F frames: pixels (x right, y down), degrees."""

    x: np.ndarray  # float32[N, F]
    y: np.ndarray  # float32[N, F]
    radius: np.ndarray  # float32[N, F]
    angle: np.ndarray  # float32[N, F]
    white: np.ndarray  # bool[N, F]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A simulated video or, with one frame and no events, a still image.

    depth: actor indices from the furthest to the nearest.  seed: the tuple that made it.
    """

    seed: tuple[int, ...]
    config: WorldConfig
    actors: tuple[Actor, ...]
    events: tuple[Event, ...]
    theme: CountTheme | None
    states: States
    depth: tuple[int, ...]

    def rng(self, purpose: int) -> np.random.Generator:
        """An independent stream of random numbers for one purpose (pixels, questions, ...)."""
        return np.random.default_rng([*self.seed, purpose])


def simulate(seed: tuple[int, ...], config: WorldConfig) -> Scene:
    """The video of this seed: the same seed and config always give the same scene."""
    rng = np.random.default_rng([*seed, 0])
    trimmed = 0
    while True:
        plan = _trim(sample_plan(rng, config), trimmed)
        for _ in range(TRIES_PER_PLAN):
            windows = sample_windows(rng, plan.events, config.seconds)
            layout = find_layout(rng, plan.actors, plan.events, config.size) if windows else None
            if layout is not None:
                return _scene(seed, config, plan, windows, layout, rng)
        trimmed += 1  # a crowded world: fewer events, but the theme's own ones stay


def _trim(plan: Plan, count: int) -> Plan:
    """The plan without its last `count` events that the theme does not need."""
    events = list(plan.events)
    theme = plan.theme
    for event in reversed(plan.events):
        themed = event.action == theme.action and theme.actor in (None, event.actor)
        if count > 0 and not themed and len(events) > 2:
            events.remove(event)
            count -= 1
    return dataclasses.replace(plan, events=tuple(events))


def _scene(
    seed: tuple[int, ...],
    config: WorldConfig,
    plan: Plan,
    windows: list[tuple[float, float]],
    layout: Layout,
    rng: np.random.Generator,
) -> Scene:
    events = tuple(
        dataclasses.replace(e, start=s, end=t, direction=d)
        for e, (s, t), d in zip(plan.events, windows, layout.directions, strict=True)
    )
    actors = tuple(
        dataclasses.replace(a, radius=float(r))
        for a, r in zip(plan.actors, layout.radii, strict=True)
    )
    states = _animate(rng, actors, events, layout, config)
    covering = {e.other for e in events if e.action == "hide"}
    depth = sorted(range(len(actors)), key=lambda i: (i in covering, i))
    return Scene(seed, config, actors, events, plan.theme, states, tuple(depth))


def _animate(
    rng: np.random.Generator,
    actors: Sequence[Actor],
    events: Sequence[Event],
    layout: Layout,
    config: WorldConfig,
) -> States:
    """Plays the events on the layout; outside of events nothing changes."""
    times = np.arange(config.num_frames) / config.fps
    ones = np.ones(len(times), np.float32)
    place = layout.start[:, None, :] * ones[:, None]  # [N, F, 2]
    radius = np.array([a.radius for a in actors])[:, None] * ones
    angle = np.array([_rest_angle(rng, a) for a in actors])[:, None] * ones
    white = np.zeros((len(actors), len(times)), bool)
    for event, (begin, target, kick) in zip(events, layout.paths, strict=True):
        i = event.actor
        progress = np.clip((times - event.start) / (event.end - event.start), 0, 1)
        inside = (times >= event.start) & (times < event.end)
        after = times >= event.start
        if event.action in ("move", "enter", "leave"):
            # Entering fixes the place before the window as well: outside of the frame.
            share = progress[:, None]
            path = begin + share * (target - begin)
            rows = slice(None) if event.action == "enter" else after
            place[i, rows] = path[rows]
        elif event.action == "hide":
            share = np.clip(np.minimum(progress, 1 - progress) / 0.35, 0, 1)[:, None]
            place[i, inside] = (begin + share * (target - begin))[inside]
        elif event.action == "hit":
            share = np.minimum(progress, 1 - progress)[:, None] * 2
            place[i, inside] = (begin + share * (target - begin))[inside]
            recoil = np.sin(np.pi * np.clip(2 * progress - 1, 0, 1))[:, None] * kick
            place[event.other, inside] += recoil[inside]
        elif event.action == "turn":
            sign = rng.choice([-1.0, 1.0])
            angle[i] += sign * QUARTER * math.floor(event.end - event.start + 0.5) * progress
        elif event.action == "grow":
            radius[i] *= 1 + (GROWTH - 1) * progress
        elif event.action == "blink":
            phase = np.mod(times - event.start, BLINK_PERIOD) / BLINK_PERIOD
            white[i] |= inside & (phase < BLINK_SHARE)
    return States(
        place[..., 0].astype(np.float32),
        place[..., 1].astype(np.float32),
        radius.astype(np.float32),
        angle.astype(np.float32),
        white,
    )


def _rest_angle(rng: np.random.Generator, actor: Actor) -> float:
    """A multiple of 90 degrees, so that the angle of one frame does not tell who has turned."""
    return QUARTER * int(rng.integers(4)) if actor.form in TURNING_FORMS else 0.0


def simulate_image(seed: tuple[int, ...], config: WorldConfig) -> Scene:
    """A still image of one to four shapes, uniformly many."""
    rng = np.random.default_rng([*seed, 0])
    count = int(rng.integers(1, 5))
    while True:
        cast = sample_cast(rng, count, IMAGE_SHARED_COLOUR)
        layout = find_layout(rng, cast, (), config.size)
        if layout is not None:
            break
    actors = tuple(
        dataclasses.replace(a, radius=float(r)) for a, r in zip(cast, layout.radii, strict=True)
    )
    states = States(
        layout.start[:, :1].astype(np.float32),
        layout.start[:, 1:].astype(np.float32),
        layout.radii[:, None].astype(np.float32),
        np.array([[_rest_angle(rng, a)] for a in actors], np.float32),
        np.zeros((count, 1), bool),
    )
    return Scene(seed, config, actors, (), None, states, tuple(range(count)))
