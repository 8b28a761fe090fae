"""Single-object tracking: area under the success curve (OTB, LaSOT, GOT-10k).

The curve is the share of frames whose IoU is strictly above 21 thresholds 0, 0.05 ... 1; its area
is the mean of the 21 values, so that a perfect track reaches 20/21. The frame that gives the
tracker its box, and frames where the object is not visible, are not counted (GOT-10k).
"""

from collections.abc import Sequence

import numpy as np

from tpo_jax.evaluation.metrics.region import box_iou

THRESHOLDS = np.linspace(0.0, 1.0, 21)

Box = Sequence[float]


def success_auc(ious: np.ndarray) -> float:
    """Area under the success curve of the per-frame overlaps float[frames]."""
    ious = np.asarray(ious, np.float64)
    if not ious.size:
        raise ValueError("ious: a track needs at least one counted frame, got none")
    return float((ious[:, None] > THRESHOLDS).mean())


def track_ious(predicted: Sequence[Box | None], target: Sequence[Box | None]) -> np.ndarray:
    """float64[counted frames]: overlaps of two tracks, one box or None (absent) per frame.

    The first visible frame is where the tracker is told the box, so it is left out. A frame where
    the object is visible and nothing is predicted counts 0.
    """
    if len(predicted) != len(target):
        raise ValueError(
            f"track: {len(predicted)} predicted frames for {len(target)} labelled ones"
        )
    visible = [index for index, box in enumerate(target) if box is not None][1:]
    return np.array([_frame_iou(predicted[index], target[index]) for index in visible])


def _frame_iou(predicted: Box | None, target: Box) -> float:
    return 0.0 if predicted is None else float(box_iou(np.array(predicted), np.array(target)))
