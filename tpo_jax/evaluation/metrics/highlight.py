"""Highlight detection: mAP and HIT@1 as the QVHighlights evaluator defines them.

A video is cut into clips of two seconds; several raters give each clip a score. A clip is positive
for a rater when the score reaches the threshold ("very good": the top of the scale).
"""

import numpy as np

CLIP_SECONDS = 2.0
# Rows that are worked on at a time: their arrays stay in the cache.
_ROWS = 256


def average_precisions(scores: np.ndarray, clips: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """float64[queries, columns]: interpolated average precision of clip scores.

    The mean of the interpolated precision over the thresholds at which recall grows; clips of equal
    score share one threshold. A column without any positive clip counts 0, one whose clips are all
    positive counts 1.

    Args:
      scores: float[queries, width]; what lies beyond a query's clips is not read.
      clips: int[queries] number of clips of each, between 1 and the width.
      positive: bool[queries, width, columns], for example one column a rater and threshold.
    """
    scores, clips = np.asarray(scores, np.float64), np.asarray(clips, np.int64)
    positive = np.asarray(positive, bool)
    if scores.shape != positive.shape[:2] or clips.shape != scores.shape[:1]:
        raise ValueError(
            f"positive: expected bool[queries, width, columns] for scores {scores.shape} and clips "
            f"{clips.shape}, got {positive.shape}"
        )
    if clips.size and not 1 <= clips.min() <= clips.max() <= scores.shape[1]:
        raise ValueError(f"clips: expected 1..{scores.shape[1]}, got {clips.min()}..{clips.max()}")
    out = np.empty((len(scores), positive.shape[2]))
    for low in range(0, len(scores), _ROWS):
        rows = slice(low, low + _ROWS)
        out[rows] = _average_precisions(scores[rows], clips[rows], positive[rows])
    return out


def hits(best: np.ndarray, clips: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """float64[queries]: 1.0 where any column marks the highest-scoring clip.

    Args:
      best: int[queries] index of the highest score; one beyond the clips is a miss.
      clips: int[queries] number of clips of each.
      positive: bool[queries, width, columns].
    """
    best, clips = np.asarray(best, np.int64), np.asarray(clips, np.int64)
    inside = best < clips
    marked = positive[np.arange(len(best)), np.where(inside, best, 0)].any(axis=-1)
    return (inside & marked).astype(np.float64)


def highlight_average_precision(predicted: np.ndarray, positive: np.ndarray) -> float:
    """Mean over raters of the average precision of one query's clip scores.

    Predictions are cut or padded with zeros to the number of clips, as the evaluator does.

    Args:
      predicted: float[n] saliency per clip.
      positive: bool[clips, raters].
    """
    positive = _as_raters(positive)
    scores = fit_length(predicted, len(positive))
    return float(average_precisions(scores[None], [len(positive)], positive[None]).mean())


def highlight_hit(predicted: np.ndarray, positive: np.ndarray) -> float:
    """1.0 when any rater marked the highest-scoring clip; the first clip wins a tie."""
    positive = _as_raters(positive)
    return float(hits([int(np.argmax(predicted))], [len(positive)], positive[None])[0])


def fit_length(predicted: np.ndarray, clips: int) -> np.ndarray:
    """float64[clips]: the prediction cut, or padded with zeros."""
    predicted = np.asarray(predicted, np.float64)[:clips]
    return np.pad(predicted, (0, clips - len(predicted)))


def clip_scores(
    times: np.ndarray,
    saliency: np.ndarray,
    start: float,
    clips: int,
    interval: float = CLIP_SECONDS,
) -> np.ndarray:
    """float64[clips]: mean of the per-frame saliency in each clip; an empty clip takes the nearest.

    Args:
      times: float[frames] seconds.
      saliency: float[frames].
      start: where the first clip begins, in seconds.
      clips: number of clips.
      interval: length of a clip in seconds.
    """
    times, saliency = np.asarray(times, np.float64), np.asarray(saliency, np.float64)
    if times.shape != saliency.shape or not times.size:
        raise ValueError(
            f"saliency: expected one value per frame time, got {saliency.shape} for {times.shape}"
        )
    index = np.floor((times - start) / interval).astype(int)
    out = np.empty(clips)
    for clip in range(clips):
        inside = index == clip
        centre = start + (clip + 0.5) * interval
        out[clip] = (
            saliency[inside].mean() if inside.any() else saliency[np.abs(times - centre).argmin()]
        )
    return out


def _as_raters(positive: np.ndarray) -> np.ndarray:
    positive = np.asarray(positive, bool)
    positive = positive[:, None] if positive.ndim == 1 else positive
    if positive.ndim != 2 or not positive.size:
        raise ValueError(f"positive: expected bool[clips, raters], got {positive.shape}")
    return positive


def _average_precisions(scores: np.ndarray, clips: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """`average_precisions` of a few queries, columns first: float64[queries, columns]."""
    width = scores.shape[1]
    inside = np.arange(width) < clips[:, None]
    # Clips that are not there come last, in a tie of their own that finds nothing.
    falling = np.where(inside, -scores, np.inf)
    order = np.argsort(falling, axis=1, kind="stable")
    ordered = np.take_along_axis(falling, order, axis=1)
    marks = np.moveaxis(positive & inside[..., None], 2, 1)
    marks = np.take_along_axis(marks, order[:, None], axis=2)
    found = np.cumsum(marks, axis=2, dtype=np.int32)
    last = np.ones(scores.shape, bool)  # of each tie
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    precision = np.where(last[:, None], found / np.arange(1.0, width + 1), 0.0)
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
    # How many had been found before the tie that ends here.
    since = np.maximum.accumulate(np.where(last, np.arange(1, width + 1), 0), axis=1)
    since = np.concatenate([np.zeros((len(since), 1), since.dtype), since[:, :-1]], axis=1)
    earlier = np.concatenate([np.zeros((*found.shape[:2], 1), found.dtype), found], axis=2)
    grew = last[:, None] & (found > np.take_along_axis(earlier, since[:, None], axis=2))
    total = (envelope * grew).sum(axis=2) / np.maximum(grew.sum(axis=2), 1)
    return np.where(found[..., -1] == clips[:, None], 1.0, total)
