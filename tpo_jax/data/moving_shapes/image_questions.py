"""Questions about a still image: colour, form, number, position."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tpo_jax.data.moving_shapes import phrases
from tpo_jax.data.moving_shapes.questions import (
    NUM_OPTIONS,
    QUESTIONS,
    Question,
    choice,
    quarter,
)
from tpo_jax.data.moving_shapes.scene import Scene
from tpo_jax.data.moving_shapes.world import COLOURS, FORMS, Actor

MAX_SHAPES = 4
# A relation is said where one axis dominates by this factor.
CLEAR = 1.7


def relation(scene: Scene, frame: int, first: Actor, second: Actor) -> str | None:
    """Where `first` is, seen from `second`: "left of", "above", ...; None when diagonal."""
    dx = float(scene.states.x[first.index, frame] - scene.states.x[second.index, frame])
    dy = float(scene.states.y[first.index, frame] - scene.states.y[second.index, frame])
    if abs(dx) >= CLEAR * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def image_questions(scene: Scene) -> list[Question]:
    """Four to eight questions about one image, one caption among them."""
    rng = scene.rng(QUESTIONS)
    return [
        *_attribute(rng, scene),
        _counting(rng, scene),
        _existence(rng, scene),
        *_position(rng, scene),
        *_place(rng, scene),
        _caption(rng, scene),
    ]


def _attribute(rng: np.random.Generator, scene: Scene) -> list[Question]:
    forms = Counter(a.form for a in scene.actors)
    colours = Counter(a.colour for a in scene.actors)
    by_form = [a for a in scene.actors if forms[a.form] == 1]
    by_colour = [a for a in scene.actors if colours[a.colour] == 1]
    questions = []
    if by_form:
        actor = by_form[int(rng.integers(len(by_form)))]
        wrong = rng.permutation([c for c in COLOURS if c != actor.colour])[: NUM_OPTIONS - 1]
        text = f"What colour is the {actor.form}?"
        questions.append(
            choice(rng, "image_attribute", text, actor.colour, [str(w) for w in wrong])
        )
    if by_colour:
        actor = by_colour[int(rng.integers(len(by_colour)))]
        wrong = rng.permutation([f for f in FORMS if f != actor.form])[: NUM_OPTIONS - 1]
        text = f"What is the {actor.colour} shape?"
        answer = f"a {actor.form}"
        questions.append(choice(rng, "image_attribute", text, answer, [f"a {w}" for w in wrong]))
    return questions


def _counting(rng: np.random.Generator, scene: Scene) -> Question:
    numbers = phrases.NUMBERS[1 : MAX_SHAPES + 1]
    answer = phrases.NUMBERS[len(scene.actors)]
    wrong = [n for n in numbers if n != answer]
    return choice(rng, "image_counting", "How many shapes are there?", answer, wrong)


def _existence(rng: np.random.Generator, scene: Scene) -> Question:
    names = {a.name for a in scene.actors}
    absent = [f"the {c} {f}" for c in COLOURS for f in FORMS]
    wrong = rng.permutation([n for n in absent if n not in names])[: NUM_OPTIONS - 1]
    answer = scene.actors[int(rng.integers(len(scene.actors)))].name
    text = "Which shape is in the picture?"
    return choice(rng, "image_existence", text, answer, [str(w) for w in wrong])


def _position(rng: np.random.Generator, scene: Scene) -> list[Question]:
    pairs = [
        (a, b, where)
        for a in scene.actors
        for b in scene.actors
        if a is not b and (where := relation(scene, 0, a, b))
    ]
    questions = []
    for index in rng.permutation(len(pairs))[:2]:
        first, second, where = pairs[index]
        wrong = [w for w in ("left of", "right of", "above", "below") if w != where]
        questions.append(
            choice(
                rng,
                "image_position",
                f"Where is {first.name}?",
                f"{where} {second.name}",
                [f"{w} {second.name}" for w in wrong],
            )
        )
    return questions


def _place(rng: np.random.Generator, scene: Scene) -> list[Question]:
    places = [(a.name, where) for a in scene.actors if (where := quarter(scene, a.index, 0))]
    return [
        Question("image_place", f"Where in the picture is {name}?", where)
        for name, where in (places[i] for i in rng.permutation(len(places))[:2])
    ]


def _caption(rng: np.random.Generator, scene: Scene) -> Question:
    """The shapes from left to right."""
    order = np.argsort(scene.states.x[:, 0])
    shapes = [f"a {scene.actors[i].colour} {scene.actors[i].form}" for i in order]
    text = str(rng.choice(["What is in the picture?", "Describe the picture."]))
    return Question("image_caption", text, phrases.join(shapes))
