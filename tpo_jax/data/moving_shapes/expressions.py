"""Referring expressions: texts that mean exactly one shape of a scene."""

from __future__ import annotations

import dataclasses
from collections import Counter

from tpo_jax.data.moving_shapes import phrases
from tpo_jax.data.moving_shapes.image_questions import relation
from tpo_jax.data.moving_shapes.scene import Scene


@dataclasses.dataclass(frozen=True)
class Expression:
    """kind: "name", "attribute", "action" (needs the video) or "relation" (needs one frame)."""

    text: str
    actor: int
    kind: str


def scene_expressions(scene: Scene) -> list[Expression]:
    """Expressions that hold for the whole scene: names, single attributes, actions."""
    colours = Counter(a.colour for a in scene.actors)
    forms = Counter(a.form for a in scene.actors)
    found = [Expression(a.name, a.index, "name") for a in scene.actors]
    for actor in scene.actors:
        if colours[actor.colour] == 1:
            found.append(Expression(f"the {actor.colour} shape", actor.index, "attribute"))
        if forms[actor.form] == 1:
            found.append(Expression(f"the {actor.form}", actor.index, "attribute"))
    doers: dict[str, set[int]] = {}
    for event in scene.events:
        doers.setdefault(phrases.general_predicate(event), set()).add(event.actor)
    for what, who in doers.items():
        if len(who) == 1:
            found.append(Expression(f"the shape that {what}", who.pop(), "action"))
    return found


def frame_expressions(scene: Scene, frame: int, seen: list[int]) -> list[Expression]:
    """Relations in one frame that single out a seen actor: "the square left of the red bar".

    The form alone may be shared; the relation then decides. An actor on the diagonal is not said to
    be on any side, so a relation is used only where every actor of that form has a clear one.
    """
    found = []
    for anchor in seen:
        sides = {
            i: relation(scene, frame, scene.actors[i], scene.actors[anchor])
            for i in seen
            if i != anchor
        }
        for actor, side in sides.items():
            form = scene.actors[actor].form
            rivals = [sides[i] for i in sides if i != actor and scene.actors[i].form == form]
            if side and all(r is not None and r != side for r in rivals):
                text = f"the {form} {side} {scene.actors[anchor].name}"
                found.append(Expression(text, actor, "relation"))
    return found
