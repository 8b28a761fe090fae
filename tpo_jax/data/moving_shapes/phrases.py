"""The words of the world: a short sentence per event, and nothing that needs many words."""

from __future__ import annotations

from collections.abc import Sequence

from tpo_jax.data.moving_shapes.world import Actor, Event

NUMBERS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
THIRD_PERSON: dict[str, str] = {
    "move": "moves",
    "turn": "turns",
    "grow": "grows",
    "blink": "blinks",
    "hit": "hits",
    "enter": "enters",
    "leave": "leaves",
    "hide": "hides behind",
}


def _object_of(event: Event, actors: Sequence[Actor]) -> str:
    """What follows the verb: a direction, another shape, or nothing."""
    if event.action == "move":
        return f" {event.direction}"
    if event.other is not None:
        return f" {actors[event.other].name}"
    return ""


def predicate(event: Event, actors: Sequence[Actor]) -> str:
    """As in "moves left", "hits the blue square"."""
    return THIRD_PERSON[event.action] + _object_of(event, actors)


def bare_predicate(event: Event, actors: Sequence[Actor]) -> str:
    """As in "move left", "hit the blue square"."""
    verb = "hide behind" if event.action == "hide" else event.action
    return verb + _object_of(event, actors)


def general_predicate(event: Event) -> str:
    """The predicate without naming a second shape: "hits another shape"."""
    if event.action == "move":
        return f"moves {event.direction}"
    if event.other is not None:
        return f"{THIRD_PERSON[event.action]} another shape"
    return THIRD_PERSON[event.action]


def sentence(event: Event, actors: Sequence[Actor]) -> str:
    """As in "the red circle moves left"."""
    return f"{actors[event.actor].name} {predicate(event, actors)}"


def join(parts: Sequence[str]) -> str:
    """As in "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]
