"""Pixels and visible masks of a scene."""

from __future__ import annotations

import dataclasses

import numpy as np

from tpo_jax.data.moving_shapes.scene import Scene
from tpo_jax.data.moving_shapes.world import BLINK_COLOUR, COLOURS, Actor

PIXELS = 1  # purpose of the random stream, see Scene.rng


@dataclasses.dataclass(frozen=True)
class Rendered:
    """frames: uint8[F, H, W, 3]. visible: bool[N, F, H, W], what can be seen of each actor."""

    frames: np.ndarray
    visible: np.ndarray


def render(scene: Scene) -> Rendered:
    """All frames of the scene; masks leave out what nearer actors cover."""
    states, size = scene.states, scene.config.size
    stacked = np.stack([states.x, states.y, states.radius, states.angle, states.white])
    # Most frames repeat the one before: only the frames that differ are drawn.
    unique, inverse = np.unique(stacked.reshape(-1, stacked.shape[-1]), axis=1, return_inverse=True)
    unique = unique.reshape(5, len(scene.actors), -1)
    rng = scene.rng(PIXELS)
    drawn = np.broadcast_to(_background(rng, size), (unique.shape[-1], size, size, 3)).copy()
    visible = np.zeros((len(scene.actors), unique.shape[-1], size, size), bool)
    for index in scene.depth:
        x, y, radius, angle, white = unique[:, index]
        alpha = coverage(scene.actors[index].form, x, y, radius, angle, size)
        colour = np.where(
            white[:, None] > 0, BLINK_COLOUR, COLOURS[scene.actors[index].colour]
        ).astype(np.float32)
        drawn += alpha[..., None] * (colour[:, None, None, :] - drawn)
        solid = alpha >= 0.5
        visible &= ~solid
        visible[index] = solid
    inverse = inverse.reshape(-1)
    noise = rng.standard_normal((len(inverse), size, size, 1), dtype=np.float32)
    frames = drawn[inverse] + noise * scene.config.noise
    return Rendered(np.clip(frames + 0.5, 0, 255).astype(np.uint8), visible[:, inverse])


def coverage(
    form: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, angle: np.ndarray, size: int
) -> np.ndarray:
    """float32[U, size, size]: share of each pixel that the form covers, for U states (pixels, degrees)."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    dx = grid[None, None, :] - x.astype(np.float32)[:, None, None]
    dy = grid[None, :, None] - y.astype(np.float32)[:, None, None]
    turn = np.deg2rad(angle.astype(np.float32))[:, None, None]
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    inside = _signed_distance(form, u, v, radius.astype(np.float32)[:, None, None])
    return np.clip(inside + 0.5, 0, 1)


def _signed_distance(form: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Pixels to the outline, positive inside; u right and v down in the frame of the form."""
    if form == "circle":
        return radius - np.sqrt(u * u + v * v)
    au, av = np.abs(u), np.abs(v)
    if form == "square":
        return 0.88 * radius - np.maximum(au, av)
    if form == "triangle":  # equilateral, apex up; three edges at half the circumradius
        sides = 0.866025 * au - 0.5 * v
        return 0.625 * radius - np.maximum(v, sides)
    if form == "cross":
        long, wide = 1.12 * radius, 0.4 * radius
        return np.maximum(np.minimum(long - au, wide - av), np.minimum(wide - au, long - av))
    if form == "bar":
        return np.minimum(1.33 * radius - au, 0.42 * radius - av)
    raise ValueError(f"form={form!r}: no such form is drawn; add it here and to world.FORMS.")


def actor_colour(actor: Actor) -> tuple[int, int, int]:
    """RGB of an actor at rest."""
    return COLOURS[actor.colour]


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32[size, size, 3]: a dark, static, slowly varying and slightly tinted ground."""
    coarse = rng.uniform(-1, 1, (4, 4, 1)) * 12 + rng.uniform(-1, 1, (4, 4, 3)) * 5
    at = np.linspace(0, 3, size)
    low = np.minimum(at.astype(int), 2)
    part = at - low
    weights = np.zeros((size, 4))
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] += part
    field = np.einsum("ia,jb,abc->ijc", weights, weights, coarse)
    return (field + rng.uniform(45, 80)).astype(np.float32)
