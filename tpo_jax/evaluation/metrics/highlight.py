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
    """1.0 when any rater marked the highest-scoring clip; the first clip wins a tie.

    Args:
      predicted: float[n] saliency per clip.
      positive: bool[clips, raters].
    """
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
    """`average_precisions` of a few queries: only the positive clips are looked at."""
    rows, width, columns = positive.shape
    # Clips that are not there come last.
    inside = np.arange(width) < clips[:, None]
    falling = np.where(inside, -scores, np.inf)
    order = np.argsort(falling, axis=1)
    ordered = np.take_along_axis(falling, order, axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(width)[None], axis=1)
    tied = np.zeros((rows, width), bool)  # with the next
    tied[:, :-1] = ordered[:, 1:] == ordered[:, :-1]
    last = np.where(tied, width, np.arange(width))
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]  # place where the tie ends
    curve, clip = np.divmod(np.flatnonzero(np.moveaxis(positive, 2, 1) & inside[:, None]), width)
    # One entry a positive clip, curve by curve, from the highest score to the lowest.
    curve, at = np.divmod(np.sort(curve * width + place[curve // columns, clip]), width)
    positives = np.bincount(curve, minlength=rows * columns)
    found = np.arange(len(curve)) - np.repeat(np.cumsum(positives) - positives, positives) + 1
    threshold = last[curve // columns, at]
    # Of the clips of one tie the last speaks for all.
    new = np.ones(len(curve), bool)
    new[:-1] = (curve[1:] != curve[:-1]) | (threshold[1:] != threshold[:-1])
    curve, precision = curve[new], found[new] / (threshold[new] + 1)
    # Precisions are at most 1: raised by 2 from curve to curve, one running maximum serves all.
    level = 2.0 * (rows * columns - curve)
    envelope = np.maximum.accumulate((precision + level)[::-1])[::-1] - level
    total = np.bincount(curve, envelope, rows * columns)
    mean = total / np.maximum(np.bincount(curve, minlength=rows * columns), 1)
    whole = positives.reshape(rows, columns) == clips[:, None]
    return np.where(whole, 1.0, mean.reshape(rows, columns))
