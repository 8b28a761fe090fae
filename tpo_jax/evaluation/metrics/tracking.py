"""Single-object tracking: success, precision and normalised precision (LaSOT), AO and SR (GOT-10k).

The success curve is the share of frames whose IoU is strictly above 21 thresholds 0, 0.05 ... 1;
its area is the mean of the 21 values, so that a perfect track reaches 20/21. `track_ious` counts
the frames of our own tracks; `lasot_scores` and `got10k_ious` count as the two toolkits do, whose
boxes are (x, y, width, height) in pixels: `hold_last` and `pixel_boxes` make them of our tracks.
"""

from collections.abc import Sequence

import numpy as np

from tpo_jax.evaluation.metrics.region import box_iou

THRESHOLDS = np.linspace(0.0, 1.0, 21)
PRECISION_PIXELS = 20.0
NORMALISED_PRECISION = 0.2

Box = Sequence[float]


def success_auc(ious: np.ndarray) -> float:
    """Area under the success curve of the per-frame overlaps float[frames]."""
    ious = _some(ious)
    return float((ious[:, None] > THRESHOLDS).mean())


def average_overlap(ious: np.ndarray) -> float:
    """AO: mean of the overlaps float[frames], those of all sequences in one array."""
    return float(_some(ious).mean())


def success_rate(ious: np.ndarray, threshold: float = 0.5) -> float:
    """SR: share of the overlaps float[frames] strictly above the threshold (0.5 or 0.75)."""
    return float((_some(ious) > threshold).mean())


def track_ious(predicted: Sequence[Box | None], target: Sequence[Box | None]) -> np.ndarray:
    """float64[counted frames]: overlaps of two tracks of (x1, y1, x2, y2), None where absent.

    The first visible frame is where the tracker is told the box, so it is left out, and so are
    frames where the object is not visible. A frame where the object is visible and nothing is
    predicted counts 0.
    """
    if len(predicted) != len(target):
        raise ValueError(
            f"track: {len(predicted)} predicted frames for {len(target)} labelled ones"
        )
    visible = [index for index, box in enumerate(target) if box is not None][1:]
    return np.array([_frame_iou(predicted[index], target[index]) for index in visible])


def hold_last(boxes: Sequence[Box | None], given: Box) -> list[Box]:
    """Boxes as files of the toolkits have them, one a frame: where there is none, the last one.

    Args:
      boxes: of the frames.
      given: what the tracker is told, which stands until there is another.
    """
    held = [given]
    for box in boxes:
        held.append(held[-1] if box is None else box)
    return held[1:]


def pixel_boxes(boxes: Sequence[Box], width: float, height: float) -> np.ndarray:
    """float64[n, 4] (x, y, width, height) of normalised (x1, y1, x2, y2) in frames of that size."""
    scaled = np.asarray(boxes, np.float64) * [width, height, width, height]
    # They were whole pixels before they were normalised: the toolkits' limits are met exactly.
    return np.round(np.hstack([scaled[:, :2], scaled[:, 2:] - scaled[:, :2]]), 9)


def lasot_scores(
    predicted: np.ndarray, target: np.ndarray, absent: np.ndarray
) -> dict[str, float]:
    """Success AUC, precision and normalised precision of one sequence, in [0, 1].

    As the LaSOT toolkit counts: the first frame takes the label; a prediction that is not a box
    takes the one before; frames without the object are not compared but stay in the number of
    frames that all shares are of; a label with a number that is not positive fails in success and
    passes in precision.

    Args:
      predicted: float[frames or more, 4] (x, y, width, height), NaN where there is none.
      target: float[frames, 4].
      absent: bool[frames] whether the object is out of view or hidden.
    """
    target, absent = np.asarray(target, np.float64), np.asarray(absent, bool)
    boxes = np.asarray(predicted, np.float64)[: len(target)].copy()
    if not len(target) or boxes.shape != target.shape or absent.shape != target.shape[:1]:
        raise ValueError(
            f"predicted: expected float[{len(target)}, 4] and absent bool[{len(target)}], got "
            f"{boxes.shape} and {absent.shape}"
        )
    usable = ~np.isnan(boxes).any(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    usable |= np.isnan(target).any(axis=1)
    boxes = boxes[np.maximum.accumulate(np.where(usable, np.arange(len(boxes)), 0))]
    boxes[0] = target[0]
    boxes, labels = boxes[~absent], target[~absent]
    valid = (labels > 0).all(axis=1)
    overlap = np.where(valid, _xywh_iou(boxes, labels), -1.0)
    # From centre to centre; a side of n pixels reaches from its first pixel to the n-th.
    offset = (boxes[:, :2] + (boxes[:, 2:] - 1) / 2) - (labels[:, :2] + (labels[:, 2:] - 1) / 2)
    distance = np.where(valid, np.sqrt((offset**2).sum(axis=1)), -1.0)
    sizes = np.where(valid[:, None], labels[:, 2:], 1.0)
    relative = np.where(valid, np.sqrt(((offset / sizes) ** 2).sum(axis=1)), -1.0)
    above = (overlap[:, None] > THRESHOLDS).sum(axis=0)
    return {
        "success": float(above.mean() / len(target)),
        "precision": float((distance <= PRECISION_PIXELS).sum() / len(target)),
        "normalised_precision": float((relative <= NORMALISED_PRECISION).sum() / len(target)),
    }


def got10k_ious(
    predicted: np.ndarray,
    target: np.ndarray,
    visible: np.ndarray | None = None,
    bound: tuple[float, float] | None = None,
) -> np.ndarray:
    """float64[counted frames]: overlaps of one sequence as the GOT-10k toolkit counts them.

    The first frame is not counted, nor are frames where the object is not visible.

    Args:
      predicted: float[frames, 4] (x, y, width, height).
      target: float[frames, 4].
      visible: bool[frames], or the `cover` labels, of which 0 is not visible; None for all.
      bound: (width, height) of the image; corner and size of both boxes are clipped to it.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if predicted.shape != target.shape or predicted.ndim != 2 or predicted.shape[1] != 4:
        raise ValueError(
            f"predicted: expected float[frames, 4] as target {target.shape}, got {predicted.shape}"
        )
    boxes = [predicted[1:], target[1:]]
    if bound is not None:
        boxes = [_clip(rows, np.asarray(bound, np.float64)) for rows in boxes]
    ious = _xywh_iou(*boxes)
    return ious if visible is None else ious[np.asarray(visible)[1:] > 0]


def _xywh_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64[n] in [0, 1]; 0 where both are empty."""
    start = np.maximum(first[:, :2], second[:, :2])
    end = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    sides = np.maximum(end - start, 0.0)
    shared = sides[:, 0] * sides[:, 1]
    union = first[:, 2] * first[:, 3] + second[:, 2] * second[:, 3] - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)
    return np.clip(iou, 0.0, 1.0)


def _clip(boxes: np.ndarray, bound: np.ndarray) -> np.ndarray:
    corner = np.clip(boxes[:, :2], 0.0, bound)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0.0, bound - corner)], axis=1)


def _some(ious: np.ndarray) -> np.ndarray:
    ious = np.asarray(ious, np.float64)
    if not ious.size:
        raise ValueError("ious: a track needs at least one counted frame, got none")
    return ious


def _frame_iou(predicted: Box | None, target: Box) -> float:
    return 0.0 if predicted is None else float(box_iou(np.array(predicted), np.array(target)))
