"""Moment retrieval: R1@theta, mIoU and mAP as the QVHighlights evaluator defines them.

Windows are (start, end) in seconds. R1 takes the highest-scoring window of a query against the
label window that it overlaps best; mAP is the mean over IoU 0.50, 0.55 ... 0.95 of the interpolated
average precision of one query with at most ten windows.
"""

import numpy as np

MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MAX_WINDOWS = 10


def window_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of windows float[..., 2] that broadcast against each other; 0 where both are empty."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    intersection = np.clip(
        np.minimum(first[..., 1], second[..., 1]) - np.maximum(first[..., 0], second[..., 0]),
        0.0,
        None,
    )
    lengths = [np.clip(w[..., 1] - w[..., 0], 0.0, None) for w in (first, second)]
    union = lengths[0] + lengths[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def top1_iou(windows: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> float:
    """IoU of the highest-scoring window with the label window it overlaps best; 0 without windows.

    Args:
      windows: float[n, 2] seconds.
      scores: float[n].
      targets: float[m, 2] seconds, m >= 1.
    """
    targets = np.asarray(targets, np.float64).reshape(-1, 2)
    if not len(targets):
        raise ValueError("targets: a temporal query needs at least one label window, got none")
    if not len(windows):
        return 0.0
    best = np.asarray(windows, np.float64)[int(np.argmax(scores))]
    return float(window_iou(best, targets).max())


def query_average_precision(
    windows: np.ndarray,
    scores: np.ndarray,
    targets: np.ndarray,
    thresholds: tuple[float, ...] = MAP_THRESHOLDS,
) -> np.ndarray:
    """float64[thresholds]: interpolated average precision of one query at each IoU threshold."""
    targets = np.asarray(targets, np.float64).reshape(-1, 2)
    if not len(targets):
        raise ValueError("targets: a temporal query needs at least one label window, got none")
    if not len(windows):
        return np.zeros(len(thresholds))
    order = np.argsort(-np.asarray(scores, np.float64)[:MAX_WINDOWS], kind="stable")
    ious = window_iou(np.asarray(windows, np.float64)[:MAX_WINDOWS][order][:, None], targets[None])
    return np.array([_interpolated_ap(_true_positives(ious, t), len(targets)) for t in thresholds])


def _true_positives(ious: np.ndarray, threshold: float) -> np.ndarray:
    """bool[n]: each window, best score first, claims the free label it overlaps most."""
    free = np.ones(ious.shape[1], bool)
    hits = np.zeros(ious.shape[0], bool)
    for row, overlap in enumerate(ious):
        candidates = np.where(free & (overlap >= threshold), overlap, -1.0)
        label = int(np.argmax(candidates))
        if candidates[label] >= 0:
            hits[row], free[label] = True, False
    return hits


def _interpolated_ap(hits: np.ndarray, num_targets: int) -> float:
    """Area under the precision-recall curve with precision made non-increasing (VOC 2011)."""
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / num_targets)
