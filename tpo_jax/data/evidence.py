"""What a model is allowed to see of a video: everything, nothing, or one frame.

Training and evaluation call the same pure function, so that a floor ("a text-only model", "a
single-middle-frame model") is scored as it was trained: on the rows of the real model with the
evidence taken away. Text and shapes stay as they are; a clip of the middle frame alone is cheaper.
"""

from typing import Any

import numpy as np

MODES = ("full", "blind", "middle_frame")

# Inside a prefix the visual span holds <pad>: the template reserves those places and the model
# writes the visual embeddings over them.
PAD_TOKEN = 0


def apply_evidence(batch: dict[str, Any], mode: str) -> dict[str, Any]:
    """Returns the batch with the hidden frames zeroed, invalid and their visual tokens masked.

    Args:
      batch: nested dict of NumPy arrays with `frames` uint8[B, F, H, W, 3], `frame_valid`
        bool[B, F], `prefix_tokens` and `prefix_segments` int32[B, P], and if there are any
        `clip_features` float32[B, F, D] and `tiles` uint8[B, T, S, S, 3]; the rest passes through.
      mode: "full" leaves the batch alone; "blind" hides every frame; "middle_frame" keeps the
        middle one of the valid frames of each row.
    """
    if mode not in MODES:
        raise ValueError(f"evidence: got {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "full":
        return batch
    valid = np.asarray(batch["frame_valid"], bool)
    kept = middle_frame(valid) if mode == "middle_frame" else np.zeros_like(valid)
    segments = np.asarray(batch["prefix_segments"])
    visible = visible_tokens(np.asarray(batch["prefix_tokens"]), kept)
    hidden = {
        "frames": np.where(kept[:, :, None, None, None], batch["frames"], 0).astype(np.uint8),
        "frame_valid": kept,
        "prefix_segments": np.where(visible, segments, 0).astype(segments.dtype),
    }
    if "clip_features" in batch:
        hidden["clip_features"] = np.where(kept[:, :, None], batch["clip_features"], np.float32(0))
    if "tiles" in batch:  # of an image, the one frame of its row
        shown = kept[:, :1, None, None, None]
        hidden["tiles"] = np.where(shown, batch["tiles"], 0).astype(np.uint8)
    return batch | hidden


def middle_frame(valid: np.ndarray) -> np.ndarray:
    """bool[B, F] with only the middle valid frame of each row set (the later of two middles)."""
    rank = np.cumsum(valid, axis=1) - 1
    count = valid.sum(axis=1, keepdims=True)
    return valid & (rank == count // 2)


def visible_tokens(tokens: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """bool[B, P]: text tokens, and the visual tokens of the frames in `kept` bool[B, F].

    The visual span is the run of <pad> that text follows (padding at the end has none after it).
    Its tokens are stored frame by frame, the same number for each frame.
    """
    text = tokens != PAD_TOKEN
    visual = ~text & np.logical_or.accumulate(text[:, ::-1], axis=1)[:, ::-1]
    count, frames = visual.sum(axis=1, keepdims=True), kept.shape[1]
    if (count % frames).any():
        raise ValueError(
            f"prefix_tokens: {count.ravel().tolist()} visual tokens, expected a multiple of the "
            f"{frames} frames"
        )
    rank = np.cumsum(visual, axis=1) - 1
    frame = np.clip(rank * frames // np.maximum(count, 1), 0, frames - 1)
    return ~visual | np.take_along_axis(kept, frame, axis=1)
