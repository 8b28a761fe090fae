"""Pixels and visible masks of a scene."""

from __future__ import annotations

import dataclasses

import numpy as np

from tpo_jax.data.moving_shapes.scene import Scene
from tpo_jax.data.moving_shapes.world import BLINK_COLOUR, COLOURS, EXTENT

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
    drawn = np.repeat(_background(rng, size)[None], unique.shape[-1], axis=0)
    visible = np.zeros((len(scene.actors), unique.shape[-1], size, size), bool)
    for index in scene.depth:
        x, y, radius, angle, white = unique[:, index]
        actor = scene.actors[index]
        rows, columns = _extent(y, radius, actor.form, size), _extent(x, radius, actor.form, size)
        alpha = coverage(actor.form, x, y, radius, angle, rows, columns)
        colour = np.where(white[:, None] > 0, BLINK_COLOUR, COLOURS[actor.colour])
        window = drawn[:, rows, columns]
        window += alpha[..., None] * (colour.astype(np.float32)[:, None, None] - window)
        solid = alpha >= 0.5
        visible[:, :, rows, columns] &= ~solid
        visible[index, :, rows, columns] = solid
    inverse = inverse.reshape(-1)
    noise = rng.standard_normal((len(inverse), size, size, 1), dtype=np.float32)
    noise *= scene.config.noise
    frames = drawn[inverse]
    frames += noise + 0.5
    return Rendered(np.clip(frames, 0, 255, out=frames).astype(np.uint8), visible[:, inverse])


def _extent(centre: np.ndarray, radius: np.ndarray, form: str, size: int) -> slice:
    """The rows (or columns) that an actor ever touches."""
    reach = EXTENT[form] * radius + 1
    low, high = np.min(centre - reach), np.max(centre + reach)
    return slice(int(np.clip(low, 0, size)), int(np.clip(np.ceil(high), 0, size)))


def coverage(
    form: str,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    angle: np.ndarray,
    rows: slice,
    columns: slice,
) -> np.ndarray:
    """float32[U, rows, columns]: share of each pixel covered, in U states (pixels, degrees)."""
    across = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5
    along = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5
    dx = across[None, None, :] - x.astype(np.float32)[:, None, None]
    dy = along[None, :, None] - y.astype(np.float32)[:, None, None]
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


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32[size, size, 3]: a dark, static, slowly varying and slightly tinted ground."""
    coarse = rng.uniform(-1, 1, (4, 4, 1)) * 12 + rng.uniform(-1, 1, (4, 4, 3)) * 5
    at = np.linspace(0, 3, size)
    low = np.minimum(at.astype(int), 2)
    part = at - low
    weights = np.zeros((size, 4))
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] += part
    field = np.tensordot(weights, np.tensordot(weights, coarse, (1, 1)), (1, 1))
    return (field + rng.uniform(45, 80)).astype(np.float32)
