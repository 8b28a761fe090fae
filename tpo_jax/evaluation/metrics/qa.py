"""Multiple-choice accuracy by option likelihood."""

import numpy as np


def option_correct(option_logps: np.ndarray, answer: int) -> float:
    """1.0 when the option with the highest summed log-probability is the answer.

    Equal likelihoods are shared: an answer that ties with n - 1 others counts 1 / n, so that a
    model which cannot tell the options apart scores exactly chance, whatever the order of the
    options.

    Args:
      option_logps: float[options], summed over the tokens of each option.
      answer: index of the right option.
    """
    logps = np.asarray(option_logps, np.float64)
    if logps.ndim != 1 or not 0 <= answer < logps.size:
        raise ValueError(
            f"option_logps: expected float[options] holding answer {answer}, got {logps.shape}"
        )
    if np.isnan(logps).any():
        raise ValueError(f"option_logps: a log-probability is NaN: {logps.tolist()}")
    best = logps == logps.max()
    return float(best[answer] / best.sum())


def scores(value: float, kind: str, media: str) -> dict[str, float]:
    """What one question counts for: all, those of its kind, and those about videos.

    Args:
      value: of `option_correct`.
      kind: of the question.
      media: "video" or "image".
    """
    found = {"qa/accuracy": value, f"qa/accuracy/{kind}": value}
    return found | ({"qa/accuracy_videos": value} if media == "video" else {})
