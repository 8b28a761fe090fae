"""Sees what happens in a scene from its states and masks alone, as a check on plans and labels."""

from __future__ import annotations

import numpy as np

from tpo_jax.data.moving_shapes import phrases
from tpo_jax.data.moving_shapes.scene import Scene


def _runs(changed: np.ndarray) -> list[tuple[int, int]]:
    """[first, last] frames of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, changed.astype(int), 0]))
    return list(zip(edges[::2], edges[1::2] - 1, strict=True))


def _merged(runs: list[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in runs:
        if merged and first - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def observed(scene: Scene, visible: np.ndarray) -> list[tuple[float, float, str]]:
    """(start, end, sentence) by start. visible: bool[N, F, H, W]."""
    fps = scene.config.fps
    found = []
    for actor in scene.actors:
        for first, last, predicate in _actor_events(scene, visible, actor.index):
            found.append((first / fps, (last + 1) / fps, f"{actor.name} {predicate}"))
    return sorted(found)


def _actor_events(scene, visible, i):
    states, fps = scene.states, scene.config.fps
    for first, last in _merged(_runs(states.white[i]), fps // 2):
        yield first, last, "blinks"
    for first, last in _runs(np.diff(states.radius[i]) != 0):
        yield first, last, "grows"
    for first, last in _runs(np.diff(states.angle[i]) != 0):
        yield first, last, "turns"
    moving = np.hypot(np.diff(states.x[i]), np.diff(states.y[i])) > 1e-3
    for first, last in _joined_behind_others(_runs(moving), visible[i]):
        predicate = _translation(scene, visible, i, first, last + 1)
        if predicate:
            yield first, last, predicate


def _joined_behind_others(runs, visible):
    """Standing still out of sight is part of hiding: such runs are one."""
    joined: list[tuple[int, int]] = []
    for first, last in runs:
        if joined and not visible[joined[-1][1] + 1 : first + 1].any():
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _translation(scene, visible, i, first, last):
    x, y, size = scene.states.x[i], scene.states.y[i], scene.config.size

    def inside(frame):
        return 0 <= x[frame] <= size and 0 <= y[frame] <= size

    dx, dy = x[last] - x[first], y[last] - y[first]
    if not inside(first):
        return "enters"
    if not inside(last):
        return "leaves"
    if np.hypot(dx, dy) > 10:
        sides = ("left", "right") if abs(dx) > abs(dy) else ("up", "down")
        return f"moves {sides[int(dx + dy > 0)]}"
    away = np.hypot(x[first : last + 1] - x[first], y[first : last + 1] - y[first])
    if away.max() < 8:
        return None  # pushed by another shape
    furthest = first + int(away.argmax())
    other = _nearest(scene, i, furthest)
    verb = "hides behind" if not visible[i, furthest].any() else "hits"
    return f"{verb} {scene.actors[other].name}"


def _nearest(scene, i, frame):
    distance = np.hypot(
        scene.states.x[:, frame] - scene.states.x[i, frame],
        scene.states.y[:, frame] - scene.states.y[i, frame],
    )
    reach = scene.states.radius[:, frame]
    distance = distance - reach
    distance[i] = np.inf
    return int(distance.argmin())


def planned(scene: Scene) -> list[tuple[float, float, str]]:
    """The same from the labels."""
    return sorted((e.start, e.end, phrases.sentence(e, scene.actors)) for e in scene.events)
