"""Highlight detection: mAP and HIT@1 as the QVHighlights evaluator defines them.

A video is cut into clips of two seconds; several raters give each clip a score. A clip is positive
for a rater when the score reaches the threshold ("very good": the top of the scale).
"""

import numpy as np

CLIP_SECONDS = 2.0


def highlight_average_precision(predicted: np.ndarray, positive: np.ndarray) -> float:
    """Mean over raters of the interpolated average precision of the clip scores.

    A rater without any positive clip counts 0, one whose clips are all positive counts 1.
    Predictions are cut or padded with zeros to the number of clips, as the evaluator does.

    Args:
      predicted: float[n] saliency per clip.
      positive: bool[clips, raters].
    """
    positive = _as_raters(positive)
    scores = fit_length(predicted, len(positive))
    return float(np.mean([_average_precision(scores, rater) for rater in positive.T]))


def highlight_hit(predicted: np.ndarray, positive: np.ndarray) -> float:
    """1.0 when any rater marked the highest-scoring clip; the first clip wins a tie."""
    positive = _as_raters(positive)
    best = int(np.argmax(predicted))
    return float(best < len(positive) and positive[best].any())


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


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean of the interpolated precision over the thresholds at which recall grows."""
    if positive.all() or not positive.any():
        return float(positive.all())
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    found = np.cumsum(positive[order])[last_of_tie]
    precision = found / (np.flatnonzero(last_of_tie) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[np.diff(found, prepend=0) > 0].mean())
