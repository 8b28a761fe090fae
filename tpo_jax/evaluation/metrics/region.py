"""Referring boxes: intersection over union and Acc@0.5. Boxes are (x1, y1, x2, y2), any unit."""

import numpy as np


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes float[..., 4] that broadcast against each other; 0 where both are empty."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    top_left = np.maximum(first[..., :2], second[..., :2])
    bottom_right = np.minimum(first[..., 2:], second[..., 2:])
    intersection = np.prod(np.clip(bottom_right - top_left, 0.0, None), axis=-1)
    union = _area(first) + _area(second) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def region_accuracy(
    predicted: np.ndarray, target: np.ndarray, threshold: float = 0.5
) -> np.ndarray:
    """float64[...]: 1.0 where the box overlaps its target by IoU >= threshold (RefCOCO, Acc@0.5).

    A question without a predicted box is a row of zeros, which overlaps nothing.
    """
    return (box_iou(predicted, target) >= threshold).astype(np.float64)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0.0, None), axis=-1)
