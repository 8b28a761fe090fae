"""Moment retrieval: R1@theta, mIoU and mAP as the QVHighlights evaluator defines them.

Windows are (start, end) in seconds, those of all queries in one array with the query of each row.
R1 takes the first window of a query against the label window that it overlaps best. mAP is the
mean over IoU 0.50, 0.55 ... 0.95, over queries, of the interpolated average precision of one
query with at most ten windows. A query without windows counts 0 (the official program stops there).
"""

import numpy as np

from tpo_jax.evaluation.metrics import detection

MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
R1_THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
MAX_WINDOWS = 10


def window_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of windows float[..., 2] that broadcast against each other; 0 where both are empty."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    iou = detection.overlap(first, second)
    return np.where(np.isinf(iou), 0.0, np.abs(iou))  # a window that ends before it starts: -0.0


def first_window_ious(
    windows: np.ndarray, query: np.ndarray, targets: np.ndarray, target_query: np.ndarray
) -> np.ndarray:
    """float64[queries]: IoU of each query's first window with the label it overlaps best.

    Args:
      windows: float[n, 2] seconds, those of one query best first.
      query: int[n] query of each window.
      targets: float[m, 2] seconds.
      target_query: int[m]; every query from 0 to the largest has a label.
    """
    windows, targets, query, target_query, _ = _checked(windows, query, targets, target_query)
    count = int(target_query.max()) + 1
    first = np.full(count, -1)
    rows = np.arange(len(query))[::-1]
    first[query[rows]] = rows  # of several rows of one query the last written, the first, stays
    pairs = np.flatnonzero(first[target_query] >= 0)
    best = np.zeros(count)
    if pairs.size:
        chosen, labels = windows[first[target_query[pairs]]], targets[pairs]
        np.maximum.at(best, target_query[pairs], _hull_iou(chosen, labels))
    return best


def average_precisions(
    windows: np.ndarray,
    scores: np.ndarray,
    query: np.ndarray,
    targets: np.ndarray,
    target_query: np.ndarray,
    thresholds: tuple[float, ...] = MAP_THRESHOLDS,
) -> np.ndarray:
    """float64[queries, thresholds]: interpolated average precision of each query.

    Of equal scores the earlier window goes first, of equal overlaps the later label is claimed.

    Args:
      windows: float[n, 2] seconds; of one query the first ten rows count.
      scores: float[n].
      query: int[n] query of each window.
      targets: float[m, 2] seconds.
      target_query: int[m]; every query from 0 to the largest has a label.
      thresholds: least IoU.
    """
    windows, targets, query, target_query, counts = _checked(windows, query, targets, target_query)
    scores = detection.finite(scores, "scores", len(windows))
    kept = np.flatnonzero(detection.place_in_group(query) < MAX_WINDOWS)
    kept = kept[np.lexsort((-scores[kept], query[kept]))]
    query = query[kept]
    hits = detection.greedy_hits(windows[kept], query, targets, target_query, thresholds)
    return detection.interpolated_ap(hits, query, counts)


def top1_iou(windows: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> float:
    """IoU of the highest-scoring window with the label window it overlaps best; 0 without windows.

    Args:
      windows: float[n, 2] seconds.
      scores: float[n].
      targets: float[m, 2] seconds, m >= 1.
    """
    windows, targets, target_query = _one_query(windows, targets)
    best = windows[[int(np.argmax(scores))]] if len(windows) else windows
    query = np.zeros(len(best), np.int64)
    return float(first_window_ious(best, query, targets, target_query)[0])


def query_average_precision(
    windows: np.ndarray,
    scores: np.ndarray,
    targets: np.ndarray,
    thresholds: tuple[float, ...] = MAP_THRESHOLDS,
) -> np.ndarray:
    """float64[thresholds]: `average_precisions` of one query."""
    windows, targets, target_query = _one_query(windows, targets)
    query = np.zeros(len(windows), np.int64)
    return average_precisions(windows, scores, query, targets, target_query, thresholds)[0]


def _hull_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU over the hull, the union where two windows meet: as the evaluator rounds it for R1."""
    start, end = np.minimum(first, second)[:, 0], np.maximum(first, second)[:, 1]
    inner = np.minimum(first[:, 1], second[:, 1]) - np.maximum(first[:, 0], second[:, 0])
    shared, union = np.maximum(inner, 0.0), end - start
    return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def _one_query(
    windows: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    windows = np.asarray(windows, np.float64).reshape(-1, 2)
    targets = np.asarray(targets, np.float64).reshape(-1, 2)
    return windows, targets, np.zeros(len(targets), np.int64)


def _checked(
    windows: np.ndarray, query: np.ndarray, targets: np.ndarray, target_query: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The arguments as float64 and int64, and how many labels each query has."""
    windows = detection.as_windows(windows, "windows")
    targets = detection.as_windows(targets, "targets")
    query, target_query = np.asarray(query, np.int64), np.asarray(target_query, np.int64)
    if len(query) != len(windows) or len(target_query) != len(targets):
        raise ValueError(
            f"query: expected one per row, got {len(query)} for {len(windows)} windows and "
            f"{len(target_query)} for {len(targets)} targets"
        )
    counts = np.bincount(target_query)
    if not counts.size or not counts.all():
        missing = int(np.argmin(counts)) if counts.size else 0
        raise ValueError(
            f"targets: a temporal query needs at least one label window, query {missing} has none"
        )
    if query.size and not 0 <= query.min() <= query.max() < len(counts):
        raise ValueError(f"query: {query.max()} has no label; there are {len(counts)} queries")
    return windows, targets, query, target_query, counts
