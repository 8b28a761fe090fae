"""Boxes and spans: normalised coordinates, overlaps, suppression. Float32 throughout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_EPSILON = 1e-7


def box_cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """float[..., 4] (centre x, centre y, width, height) -> (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def sorted_corners(boxes: jax.Array) -> jax.Array:
    """Orders the corners of float[..., 4] xyxy boxes so that x1 <= x2 and y1 <= y2."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([jnp.minimum(low, high), jnp.maximum(low, high)], axis=-1)


def box_area(boxes: jax.Array) -> jax.Array:
    """float[..., 4] xyxy with ordered corners -> float[...], in the square of their unit."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_giou(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """IoU and generalised IoU (Rezatofighi et al. 2019, 1902.09630) of xyxy boxes.

    Args:
      a, b: float[..., 4]; corners in any order.

    Returns: iou, giou float32[...]; giou has a gradient wherever the boxes differ.
    """
    a, b = sorted_corners(a), sorted_corners(b)
    size = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    intersection = jnp.prod(jnp.maximum(size, 0.0), axis=-1)
    union = box_area(a) + box_area(b) - intersection
    hull_size = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    hull = jnp.prod(hull_size, axis=-1)
    iou = intersection / jnp.maximum(union, _EPSILON)
    return iou, iou - (hull - union) / jnp.maximum(hull, _EPSILON)


def span_giou(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """IoU and generalised IoU of float[..., 2] (start, end) spans; ends in any order."""
    a, b = jnp.sort(a, axis=-1), jnp.sort(b, axis=-1)
    shared = jnp.minimum(a[..., 1], b[..., 1]) - jnp.maximum(a[..., 0], b[..., 0])
    intersection = jnp.maximum(shared, 0.0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - intersection
    hull = jnp.maximum(a[..., 1], b[..., 1]) - jnp.minimum(a[..., 0], b[..., 0])
    iou = intersection / jnp.maximum(union, _EPSILON)
    return iou, iou - (hull - union) / jnp.maximum(hull, _EPSILON)


def soft_nms_1d(
    spans: np.ndarray, scores: np.ndarray, *, sigma: float, min_score: float, limit: int
) -> list[tuple[float, float, float]]:
    """Gaussian soft non-maximum suppression (Bodla et al. 2017, 1704.04503) in one dimension.

    Args:
      spans: float[n, 2]. scores: float[n] in [0, 1].
      sigma: an overlap of IoU multiplies a score by exp(-IoU^2 / sigma).
      min_score: candidates below are dropped, except that the best one is always kept.
      limit: most spans returned.

    Returns: (start, end, score), best first.
    """
    spans, scores = np.asarray(spans, np.float64), np.asarray(scores, np.float64).copy()
    kept: list[tuple[float, float, float]] = []
    alive = np.ones(len(scores), bool)
    while alive.any() and len(kept) < limit:
        best = int(np.argmax(np.where(alive, scores, -np.inf)))
        if kept and scores[best] < min_score:
            break
        start, end = spans[best]
        kept.append((float(start), float(end), float(scores[best])))
        alive[best] = False
        shared = np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start)
        shared = np.maximum(shared, 0.0)
        union = (spans[:, 1] - spans[:, 0]) + (end - start) - shared
        overlap = shared / np.maximum(union, _EPSILON)
        scores *= np.exp(-np.square(overlap) / sigma)
    return kept


def nms_1d(
    spans: np.ndarray, scores: np.ndarray, *, iou: float
) -> list[tuple[float, float, float]]:
    """Greedy non-maximum suppression: a span that overlaps a better one by more than `iou` goes.

    Args:
      spans: float[n, 2], start <= end. scores: float[n].

    Returns: (start, end, score), best first.
    """
    spans, scores = np.asarray(spans, np.float64), np.asarray(scores, np.float64)
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        others = spans[kept]
        shared = np.minimum(spans[i, 1], others[:, 1]) - np.maximum(spans[i, 0], others[:, 0])
        shared = np.maximum(shared, 0.0)
        union = np.diff(spans[i])[0] + (others[:, 1] - others[:, 0]) - shared
        if not np.any(shared > iou * union):
            kept.append(int(i))
    return [(*map(float, spans[i]), float(scores[i])) for i in kept]
