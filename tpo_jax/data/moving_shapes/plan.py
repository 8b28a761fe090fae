"""Who is in a scene and what happens in it, before anything has a place.

A plan is drawn without looking at the layout, so that all texts follow one distribution. Wrong
options are events that another plan for the same cast could have, so their wording does not betray
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tpo_jax.data.moving_shapes.world import (
    ACTION_WEIGHTS,
    COLOURS,
    COUNTED_ACTIONS,
    COVERING_FORMS,
    DIRECTIONS,
    FORMS,
    TRANSLATIONS,
    TURNING_FORMS,
    Actor,
    CountTheme,
    Event,
    WorldConfig,
)

MAX_COUNT = 3
PHANTOM_TRIES = 60
# Share of the events of the counting theme among the different events of a video.
THEME_SHARE = 0.35
_ACTIONS = tuple(ACTION_WEIGHTS)
_CUMULATIVE = np.cumsum(list(ACTION_WEIGHTS.values()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cast and events in order of time; events have no times yet."""

    actors: tuple[Actor, ...]
    events: tuple[Event, ...]
    theme: CountTheme


def sample_cast(rng: np.random.Generator, count: int, shared_colour: float) -> tuple[Actor, ...]:
    """`count` shapes, unique by (colour, form); at most two of them share a colour."""
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    forms = [str(f) for f in rng.choice(FORMS, size=count)]
    if count > 1 and rng.random() < shared_colour:
        colours[1] = colours[0]
        forms[1] = str(rng.choice([f for f in FORMS if f != forms[0]]))
    order = rng.permutation(count)
    return tuple(Actor(i, colours[j], forms[j]) for i, j in enumerate(order))


def sample_plan(rng: np.random.Generator, config: WorldConfig) -> Plan:
    """One cast with its events; the count of the theme is uniform over 0..3."""
    sizes = np.arange(config.min_actors, config.max_actors + 1)
    weights = np.where(sizes == 2, 0.25, 1.0)  # few actors leave few wrong options in the scene
    actors = sample_cast(
        rng, int(rng.choice(sizes, p=weights / weights.sum())), config.shared_colour
    )
    theme, events = sample_events(rng, actors, num_events(rng, config))
    return Plan(actors, events, theme)


def num_events(rng: np.random.Generator, config: WorldConfig) -> int:
    """Mean `density * seconds / 10`, spread by one third, at least two."""
    mean = config.density * config.seconds / 10
    return max(2, int(np.floor(mean * rng.uniform(0.75, 1.25) + rng.random())))


def sample_events(
    rng: np.random.Generator, actors: Sequence[Actor], count: int
) -> tuple[CountTheme, tuple[Event, ...]]:
    """A counting theme and about `count` events of this cast, in order of time."""
    theme, events = _sample_theme(rng, actors)
    count = max(count, len(events) + 1)  # never the repeated event alone
    for _ in range(30 * count):
        if len(events) >= count:
            break
        event = sample_event(
            rng, _ACTIONS[np.searchsorted(_CUMULATIVE, rng.random())], actors, events
        )
        if _allowed(event, actors, events, theme):
            events.append(event)
    return theme, _in_order(rng, events)


def _sample_theme(
    rng: np.random.Generator, actors: Sequence[Actor]
) -> tuple[CountTheme, list[Event]]:
    """The theme and the events that its count asks for.

    What is asked is drawn before the count and with the same conditions for every count, so the
    question does not betray its answer.
    """
    turning = [a.index for a in actors if a.form in TURNING_FORMS]
    scope = "shapes" if len(actors) >= MAX_COUNT and rng.random() < 0.5 else "times"
    needed = MAX_COUNT if scope == "shapes" else 1
    action = str(rng.choice([a for a in COUNTED_ACTIONS if a != "turn" or len(turning) >= needed]))
    able = turning if action == "turn" else [a.index for a in actors]
    count = int(rng.integers(MAX_COUNT + 1))
    if scope == "times":
        actor = int(rng.choice(able))
        doers = [actor] * count
    else:
        actor = None
        doers = [int(i) for i in rng.permutation(able)[:count]]
    events = [Event(action, i, direction=_direction(rng, action)) for i in doers]
    return CountTheme(scope, action, actor, count), events


def sample_action(rng: np.random.Generator) -> str:
    """An action as often as it is met among the different events of a video."""
    if rng.random() < THEME_SHARE:
        return COUNTED_ACTIONS[rng.integers(len(COUNTED_ACTIONS))]
    return _ACTIONS[np.searchsorted(_CUMULATIVE, rng.random())]


def sample_phantoms(
    rng: np.random.Generator, actors: Sequence[Actor], events: Sequence[Event], count: int
) -> list[Event] | None:
    """`count` events that do not happen but would fit beside those that do, and beside each other.

    Actions and actors are drawn as in `sample_events`. None when that many cannot be found.
    """
    found: list[Event] = []
    for _ in range(PHANTOM_TRIES):
        if len(found) == count:
            break
        event = sample_event(rng, sample_action(rng), actors, [*events, *found])
        if possible(event, actors) and all(compatible(event, e) for e in (*events, *found)):
            found.append(event)
    return found if len(found) == count else None


def _direction(rng: np.random.Generator, action: str) -> str | None:
    if action not in ("move", "enter", "leave"):
        return None
    return tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]


def sample_event(
    rng: np.random.Generator, action: str, actors: Sequence[Actor], events: Sequence[Event]
) -> Event:
    """An event of this action; actors that do nothing yet are preferred."""
    weights = np.cumsum([0.2 ** sum(e.actor == a.index for e in events) for a in actors])
    actor = int(np.searchsorted(weights, rng.random() * weights[-1]))
    other = None
    if action in ("hit", "hide"):
        other = int(rng.integers(len(actors) - 1))
        other += other >= actor
    return Event(action, actor, other, _direction(rng, action))


def possible(event: Event, actors: Sequence[Actor]) -> bool:
    """Whether these forms can do this."""
    if event.action == "turn":
        return actors[event.actor].form in TURNING_FORMS
    return event.action != "hide" or actors[event.other].form in COVERING_FORMS


def _allowed(
    event: Event, actors: Sequence[Actor], events: Sequence[Event], theme: CountTheme
) -> bool:
    """Whether the event can join the others and leave the theme's count and all words clear."""
    return (
        possible(event, actors)
        and _keeps_theme(event, theme)
        and all(compatible(event, old) for old in events)
    )


def _keeps_theme(event: Event, theme: CountTheme) -> bool:
    involved = {event.actor, event.other}
    if theme.scope == "times" and theme.actor not in involved:
        return True
    if theme.action == "move" and event.action in TRANSLATIONS:
        return False  # entering or hitting is also a way of moving
    return not (
        event.action == theme.action and (theme.scope == "shapes" or event.actor == theme.actor)
    )


def compatible(a: Event, b: Event) -> bool:
    """Whether both events fit in one video."""
    involved_a = {a.actor, a.other} - {None}
    involved_b = {b.actor, b.other} - {None}
    if not involved_a & involved_b:
        return True
    for one, others in ((a, involved_b), (b, involved_a)):
        if one.action in ("enter", "leave") and one.actor in others:
            return False  # present for a part of the video only, and does nothing else
    if a.actor == b.actor:
        if a.action == b.action and (a.action != "move" or a.direction == b.direction):
            return False  # only the theme repeats events
        actions = {a.action, b.action}
        if "move" in actions and actions & set(TRANSLATIONS):
            return False
        if actions <= {"hit", "hide"}:
            return False
    if None not in (a.other, b.other) and involved_a == involved_b:
        return False  # "a hits b" and "b hits a" look the same
    return _sizes_agree(a, b) and _sizes_agree(b, a)


def _sizes_agree(a: Event, b: Event) -> bool:
    """Who hides is small and who covers is large throughout."""
    if a.action != "hide":
        return True
    grows = b.action == "grow" and b.actor in (a.actor, a.other)
    swaps = b.action == "hide" and (b.actor == a.other or b.other == a.actor)
    return not (grows or swaps)


def _in_order(rng: np.random.Generator, events: list[Event]) -> tuple[Event, ...]:
    """A random order; nobody moves in one direction twice in a row where that can be had."""
    for _ in range(20):
        order = [events[i] for i in rng.permutation(len(events))]
        moves = [(e.actor, e.direction) for e in order if e.action == "move"]
        by_actor = {i: [d for j, d in moves if j == i] for i, _ in moves}
        pairs = [p for ds in by_actor.values() for p in zip(ds[:-1], ds[1:], strict=True)]
        if all(a != b for a, b in pairs):
            break
    return tuple(order)
