"""Temporal action detection: mAP@tIoU of labelled segments, as ActivityNet's evaluation defines it.

Segments of one class are pooled over all videos and sorted by score; each claims the free label of
its class and video that it overlaps most, if the tIoU reaches the threshold, else it is a false
positive. AP is the area under the precision-recall curve with precision made non-increasing
(VOC 2011), mAP the mean over the classes that have a label.

What the official program leaves to the sort of the day is fixed here to a stable sort, reversed:
of equal scores the later segment goes first, of equal overlaps the later label is claimed. Two
segments of zero length have tIoU 0/0, which passes every threshold there, and so it does here.
"""

import dataclasses

import numpy as np

ACTIVITYNET_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
THUMOS14_THRESHOLDS = tuple(np.linspace(0.1, 0.7, 7).tolist())
# In the labels of CO2-Net and ACM-Net, not in those of BaS-Net and LACP.
THUMOS14_EXTRA_VIDEOS = ("video_test_0000270", "video_test_0001496")
# THUMOS14 features come by snippets of 16 frames at 25 frames a second.
SNIPPETS_PER_SECOND = 25 / 16


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a published number depends on besides the predictions.

    Attributes:
      subset: of the annotation file.
      thresholds: tIoU thresholds of the reported table.
      averages: {name: (lowest, highest) threshold} whose mAPs are averaged.
      left_out: videos whose labels are not counted; predictions for them stay false positives.
      rounded: labels are rounded to whole snippets of 0.64 s, as in the W-TALC family.
      num_videos: labelled videos that the subset must have; 0 for any number.
    """

    subset: str
    thresholds: tuple[float, ...]
    averages: dict[str, tuple[float, float]]
    left_out: tuple[str, ...] = ()
    rounded: bool = False
    num_videos: int = 0


def _thumos14(num_videos: int, rounded: bool) -> Protocol:
    averages = {"0.1:0.5": (0.1, 0.5), "0.3:0.7": (0.3, 0.7), "0.1:0.7": (0.1, 0.7)}
    left_out = THUMOS14_EXTRA_VIDEOS if num_videos == 210 else ()
    return Protocol("test", THUMOS14_THRESHOLDS, averages, left_out, rounded, num_videos)


PROTOCOLS = {
    "activitynet": Protocol("validation", ACTIVITYNET_THRESHOLDS, {"0.5:0.95": (0.5, 0.95)}),
    "thumos14_210_seconds": _thumos14(210, rounded=False),
    "thumos14_210_rounded": _thumos14(210, rounded=True),
    "thumos14_212_seconds": _thumos14(212, rounded=False),
    "thumos14_212_rounded": _thumos14(212, rounded=True),
}


def average_precision(
    segments: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    videos: np.ndarray,
    targets: np.ndarray,
    target_labels: np.ndarray,
    target_videos: np.ndarray,
    thresholds: tuple[float, ...] = ACTIVITYNET_THRESHOLDS,
) -> np.ndarray:
    """float64[classes, thresholds]: AP of each class; 0 for a class that is predicted nowhere.

    Args:
      segments: float[n, 2] predicted (start, end).
      scores: float[n].
      labels: int[n] class of each prediction, below the number of classes in `target_labels`.
      videos: int[n] video of each prediction; one without labels makes false positives.
      targets: float[m, 2] labelled (start, end), m >= 1.
      target_labels: int[m], every class from 0 to the largest.
      target_videos: int[m].
      thresholds: tIoU thresholds.
    """
    segments, targets = as_windows(segments, "segments"), as_windows(targets, "targets")
    scores = finite(scores, "scores", len(segments))
    labels, videos = np.asarray(labels, np.int64), np.asarray(videos, np.int64)
    target_labels = np.asarray(target_labels, np.int64)
    target_videos = np.asarray(target_videos, np.int64)
    positives = np.bincount(target_labels)
    if not positives.size or not positives.all():
        raise ValueError(
            f"target_labels: expected labels of every class from 0, got counts {positives.tolist()}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < len(positives):
        raise ValueError(f"labels: expected classes 0..{len(positives) - 1} that have a target")
    # Numbers of the pairs of video and class, one behind the last for those without a target.
    pairs, target_group = np.unique(
        target_videos * len(positives) + target_labels, return_inverse=True
    )
    pair = videos * len(positives) + labels
    group = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    group = np.where(pairs[group] == pair, group, len(pairs))
    order = np.argsort(scores, kind="stable")[::-1]
    # Class by class: what is sorted already is sorted again in no time, once a threshold.
    order = order[_small_argsort(labels[order])]
    labels = labels[order]
    hits = greedy_hits(segments[order], group[order], targets, target_group, thresholds)
    return interpolated_ap(hits, labels, positives)


def report(precision: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """{"mAP@0.5": percent, ..., "mAP@0.5:0.95": percent} of AP float[classes, thresholds]."""
    by_threshold = 100 * precision.mean(axis=0)
    thresholds = np.round(protocol.thresholds, 2)
    found = {f"mAP@{t:g}": float(v) for t, v in zip(thresholds, by_threshold, strict=True)}
    for name, (low, high) in protocol.averages.items():
        inside = (thresholds >= low) & (thresholds <= high)
        found[f"mAP@{name}"] = float(by_threshold[inside].mean())
    return found


def round_to_snippets(segments: np.ndarray) -> np.ndarray:
    """float64[n, 2] in snippets, rounded half to even, of segments in seconds."""
    return np.rint(np.asarray(segments, np.float64) * SNIPPETS_PER_SECOND)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64[...]: tIoU of windows [..., 2]; infinite where 0/0, the union being empty."""
    start = np.maximum(first[..., 0], second[..., 0])
    end = np.minimum(first[..., 1], second[..., 1])
    shared = np.maximum(end - start, 0.0)
    union = (first[..., 1] - first[..., 0]) + (second[..., 1] - second[..., 0]) - shared
    return np.divide(shared, union, out=np.full_like(shared, np.inf), where=union != 0)


def greedy_hits(
    windows: np.ndarray,
    group: np.ndarray,
    targets: np.ndarray,
    target_group: np.ndarray,
    thresholds: tuple[float, ...],
) -> np.ndarray:
    """bool[n, thresholds]: which windows claim a label of their group.

    Windows claim in the order in which they come. One step of the loop lets the next window of
    every group claim, so there are as many steps as one group has windows with a candidate.

    Args:
      windows: float64[n, 2].
      group: int[n] >= 0; a window can only claim a label of its own group. Tables have an entry
        for each number up to the largest.
      targets: float64[m, 2].
      target_group: int[m].
      thresholds: least overlap.
    """
    limits = np.asarray(thresholds, np.float64)
    hits = np.zeros((len(windows), len(limits)), bool)
    window, label, iou = _candidates(windows, group, targets, target_group, limits.min())
    if not window.size:
        return hits
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    count = np.diff(starts, append=len(window))
    step = np.repeat(place_in_group(group[window[starts]]), count)
    # Of one window's candidates the largest overlap first, of equal ones the later label. Most
    # windows have one.
    order = np.arange(len(window))
    several = np.flatnonzero(np.repeat(count > 1, count))
    order[several] = several[np.lexsort((-label[several], -iou[several], window[several]))]
    order = order[_small_argsort(step[order])]
    window, label, reached = window[order], label[order], iou[order, None] >= limits
    bounds = np.append(np.flatnonzero(np.diff(step[order], prepend=-1)), len(window))
    free = np.ones((len(targets), len(limits)), bool)
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        now, claimed = window[low:high], label[low:high]
        place = np.where(free[claimed] & reached[low:high], np.arange(high - low)[:, None], high)
        starts = np.flatnonzero(np.diff(now, prepend=-1))
        first = np.minimum.reduceat(place, starts, axis=0)
        row, column = np.nonzero(first < high)
        hits[now[starts[row]], column] = True
        free[claimed[first[row, column]], column] = False
    return hits


def interpolated_ap(hits: np.ndarray, group: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """float64[groups, thresholds]: area under each group's interpolated precision-recall curve.

    Args:
      hits: bool[n, thresholds], best score first.
      group: int[n] curve that each row belongs to.
      positives: int[groups] labels of each, at least 1.
    """
    rank = place_in_group(group) + 1
    out = np.zeros((len(positives), hits.shape[1]))
    for column, hit in enumerate(hits.T):
        rows = np.flatnonzero(hit)
        if not rows.size:
            continue
        # Between two hits precision only falls, so the envelope needs the hits alone.
        curve, place = group[rows], place_in_group(group[rows])
        precision = np.zeros((len(positives), place.max() + 1))
        precision[curve, place] = (place + 1) / rank[rows]
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.bincount(curve, minlength=len(positives))
        envelope[np.arange(envelope.shape[1]) >= found[:, None]] = 0.0
        out[:, column] = envelope.sum(axis=1) / positives
    return out


def place_in_group(group: np.ndarray) -> np.ndarray:
    """int64[n]: how many earlier rows have the same group."""
    order = np.argsort(group, kind="stable")
    first = np.diff(group[order], prepend=-1) != 0
    index = np.arange(len(group))
    place = np.empty(len(group), np.int64)
    place[order] = index - np.maximum.accumulate(np.where(first, index, 0))
    return place


def _small_argsort(values: np.ndarray) -> np.ndarray:
    """int64[n], stable, of int[n] >= 0: NumPy sorts numbers of 16 bits by their digits."""
    return np.argsort(values.astype(np.min_scalar_type(values.max(initial=0))), kind="stable")


def as_windows(windows: np.ndarray, name: str) -> np.ndarray:
    """float64[n, 2], checked."""
    windows = np.asarray(windows, np.float64).reshape(-1, 2)
    if not np.isfinite(windows).all():
        row = int(np.flatnonzero(~np.isfinite(windows).all(axis=1))[0])
        raise ValueError(f"{name}[{row}]: expected finite numbers, got {windows[row].tolist()}")
    return windows


def finite(values: np.ndarray, name: str, count: int) -> np.ndarray:
    """float64[count], checked."""
    values = np.asarray(values, np.float64)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{name}: expected {count} finite numbers, got {values.shape}: {values}")
    return values


def _candidates(
    windows: np.ndarray,
    group: np.ndarray,
    targets: np.ndarray,
    target_group: np.ndarray,
    least: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a window and a label of its group that overlap enough: (window, label, iou)."""
    by_group = np.argsort(target_group, kind="stable")
    sizes = np.bincount(target_group, minlength=np.max(group, initial=-1) + 1)
    first, count = (np.cumsum(sizes) - sizes)[group], sizes[group]
    window = np.repeat(np.arange(len(windows)), count)
    before = np.cumsum(count) - count
    label = by_group[np.arange(len(window)) + np.repeat(first - before, count)]
    iou = overlap(windows[window], targets[label])
    kept = iou >= least
    return window[kept], label[kept], iou[kept]
