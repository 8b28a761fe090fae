"""Grounded question answering: Acc@GQA, IoP and IoU as the NExT-GQA evaluator defines them.

IoP is the part of the predicted span that lies inside a labelled window, IoU the overlap over the
hull of both; each takes the labelled window that suits it best. A span of zero length has IoU 0,
and IoP 1 where a window contains it. Acc@GQA counts an answer that is right with IoP >= 0.5.
"""

import numpy as np

from tpo_jax.evaluation.metrics import detection

THRESHOLDS = (0.3, 0.5)
GROUNDED = 0.5


def overlaps(
    spans: np.ndarray, windows: np.ndarray, window_question: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64[questions], float64[questions]: best IoP and best IoU of each question.

    Args:
      spans: float[questions, 2] predicted (start, end).
      windows: float[m, 2] labelled (start, end).
      window_question: int[m] question of each window.
    """
    spans = detection.as_windows(spans, "spans")
    windows = detection.as_windows(windows, "windows")
    question = np.asarray(window_question, np.int64)
    if len(question) != len(windows) or (
        question.size and not 0 <= question.min() <= question.max() < len(spans)
    ):
        raise ValueError(f"window_question: expected {len(windows)} of {len(spans)} questions")
    (start, end), (low, high) = spans[question].T, windows.T
    shared = np.minimum(high, end) - np.maximum(low, start)
    hull = np.maximum(high, end) - np.minimum(low, start)
    length = end - start
    # A point: inside or not. A span that ends before it starts scores 0.
    inside = ((length == 0) & (low <= start) & (start <= high)).astype(np.float64)
    iop = np.divide(shared, length, out=inside, where=length > 0)
    usable = (hull > 0) & (length != 0)
    iou = np.divide(shared, hull, out=np.zeros_like(shared), where=usable)
    best = np.zeros((2, len(spans)))
    np.maximum.at(best[0], question, iop)
    np.maximum.at(best[1], question, iou)
    return best[0], best[1]


def report(iop: np.ndarray, iou: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """The line of the paper's table, in percent.

    Args:
      iop: float[questions].
      iou: float[questions].
      correct: bool[questions] whether the chosen option is the answer.
    """
    correct = np.asarray(correct, bool)
    found = {"Acc@QA": correct, "Acc@GQA": correct & (iop >= GROUNDED), "mIoP": iop}
    found |= {f"IoP@{t}": iop >= t for t in THRESHOLDS}
    found |= {"mIoU": iou} | {f"IoU@{t}": iou >= t for t in THRESHOLDS}
    return {name: 100 * float(values.mean()) for name, values in found.items()}
