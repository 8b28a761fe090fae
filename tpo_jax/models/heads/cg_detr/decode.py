"""From predictions of the CG-DETR head to windows in seconds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpo_jax.models.heads.base import ClipInfo
from tpo_jax.models.heads.geometry import nms_1d

# Of the release's suppression; its runs leave it off, but an answer in words names no window twice.
NMS_IOU = 0.7


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """Windows of the last decoder layer, after suppression, and the saliency curve.

    Returns: {"windows": [[start, end, score], ...] in seconds, best first, "saliency": [...] in
      [0, 1] for the valid frames, "times": [...] seconds of those frames}.
    """
    shown = np.asarray(clip.frame_valid, bool)
    logits = np.asarray(prediction["logits"][-1], np.float64)
    scores = _sigmoid(logits[:, 0] - logits[:, 1])  # softmax of two
    centre, width = np.asarray(prediction["spans"][-1], np.float64).T
    spans = np.clip(np.stack([centre - width / 2, centre + width / 2], axis=-1), 0.0, 1.0)
    length = clip.end - clip.start
    return {
        "windows": [
            [clip.start + start * length, clip.start + end * length, score]
            for start, end, score in nms_1d(spans, scores, iou=NMS_IOU)
        ],
        "saliency": _sigmoid(np.asarray(prediction["saliency"], np.float64)[shown]).tolist(),
        "times": np.asarray(clip.times, np.float64)[shown].tolist(),
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))
