"""Temporal head: when does it happen, and how much does each frame matter.

Anchor-free, one prediction a frame, after UniVTG (Lin et al. 2023, 2307.16715): the slot state
queries the patches of every frame, a small transformer over frames follows, and each frame answers
foreground?, distance to the window's start and end, and saliency. Several windows in one answer
come from several frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.base import (
    POSITION_OCTAVES,
    ClipInfo,
    FrameMixer,
    Head,
    HeadInputs,
    SlotAttention,
    frame_centres,
    position_waves,
)
from tpo_jax.models.heads.geometry import soft_nms_1d, span_giou
from tpo_jax.models.layers import LayerNorm, Linear, Mlp, Rngs
from tpo_jax.parallel.weighted_sum import WeightedSum

# Two labelled frames are ranked when their saliencies differ by more than this ...
_RANK_GAP = 0.1
# ... and the logits of a ranked pair should differ by at least this.
_RANK_MARGIN = 0.5
_NMS_SIGMA = 0.5
_MIN_SCORE = 0.05
_MAX_WINDOWS = 10


class TemporalHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width, heads = config.head.width, config.head.heads
        self.patch_proj = Linear(config.vision.width, width, rngs=rngs)
        self.patch_norm = LayerNorm(width)
        self.slot_mlp = Mlp(config.language.width, 2 * width, width, rngs=rngs)
        self.pool = SlotAttention(width, heads, rngs=rngs)
        self.frame_proj = Linear(2 * POSITION_OCTAVES, width, rngs=rngs)
        self.layers = nnx.Dict(
            {
                f"layer{i}": FrameMixer(width, heads, rngs=rngs)
                for i in range(config.head.layers)
            }
        )
        self.final_norm = LayerNorm(width)
        self.foreground = Linear(width, 1, rngs=rngs)
        self.offsets = Mlp(width, width, 2, rngs=rngs)
        self.saliency = Linear(width, 1, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Per-frame predictions, float32.

        Returns: "foreground" [B, S, F] logits; "spans" [B, S, F, 2] start, end normalised to the
          clip; "saliency" [B, S, F] logits; "centres" [B, F]; "frame_valid" bool[B, F].
        """
        patches = inputs.features.patches
        B, F, h, w, _ = patches.shape
        S = inputs.slot_states.shape[1]
        tokens = self.patch_norm(self.patch_proj(patches)).reshape(B * F, h * w, -1)
        slots = jnp.repeat(self.slot_mlp(inputs.slot_states), F, axis=0)
        x = self.pool(slots, tokens).reshape(B, F, S, -1)
        centres = frame_centres(inputs.frame_valid)
        time = self.frame_proj(position_waves(centres[..., None]))
        x = jnp.swapaxes(x + time[:, :, None], 1, 2)
        for layer in self.layers.values():
            x = layer(x, inputs.frame_valid)
        x = self.final_norm(x)
        # Distances from the frame to both ends, each at most the whole clip.
        reach = jax.nn.sigmoid(self.offsets(x))
        spans = centres[:, None, :, None] + reach * jnp.array([-1.0, 1.0])
        return {
            "foreground": self.foreground(x)[..., 0],
            "spans": spans,
            "saliency": self.saliency(x)[..., 0],
            "centres": centres,
            "frame_valid": inputs.frame_valid,
        }


def assign(
    centres: jax.Array, frame_valid: jax.Array, windows: jax.Array, window_valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which frames are foreground, and the window that each of them answers for.

    A frame answers for the shortest window that holds its centre; a window that holds no centre is
    given to the valid frame nearest to its middle.

    Args:
      centres: float32[B, F]; frame_valid: bool[B, F].
      windows: float32[B, S, W, 2] normalised; window_valid: bool[B, S, W].

    Returns: foreground bool[B, S, F], target float32[B, S, F, 2].
    """
    start, end = windows[..., None, 0], windows[..., None, 1]  # [B, S, W, 1]
    position = centres[:, None, None]  # [B, 1, 1, F]
    usable = frame_valid[:, None, None]
    inside = (start <= position) & (position <= end) & usable
    gap = jnp.where(usable, jnp.abs(position - (start + end) / 2), jnp.inf)
    nearest = jax.nn.one_hot(jnp.argmin(gap, axis=-1), position.shape[-1], dtype=bool) & usable
    held = jnp.any(inside, axis=-1, keepdims=True)
    candidate = jnp.where(held, inside, nearest) & window_valid[..., None]  # [B, S, W, F]
    length = jnp.where(candidate, end - start, jnp.inf)
    choice = jnp.argmin(length, axis=2)  # [B, S, F]
    target = jnp.take_along_axis(windows, choice[..., None], axis=2)
    return jnp.any(candidate, axis=2), target


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """Foreground BCE, boundary L1 and 1 - GIoU on foreground frames, saliency BCE + ranking hinge.

    Every slot has weight 1 in a term it has labels for, whatever its number of frames.

    Args:
      predictions: of `TemporalHead`.
      targets: "windows" [B, S, W, 2] start and end, normalised to the clip; "window_valid"
        bool[B, S, W]; "saliency" [B, S, F] in [0, 1], below 0 where a frame has no label.
      valid: bool[B, S], slots in use.
    """
    frame_valid, centres = predictions["frame_valid"], predictions["centres"]
    windows = targets["windows"].astype(jnp.float32)
    window_valid = targets["window_valid"] & valid[..., None]
    foreground, wanted = assign(centres, frame_valid, windows, window_valid)
    has_windows = jnp.any(window_valid, axis=-1)
    shown = jnp.broadcast_to(frame_valid[:, None], foreground.shape)

    # Where there is no target, a fixed non-degenerate span keeps the (unused) gradient finite.
    wanted = jnp.where(foreground[..., None], wanted, jnp.array([0.25, 0.75]))
    _, giou = span_giou(predictions["spans"], wanted)
    distance = jnp.sum(jnp.abs(predictions["spans"] - wanted), axis=-1)
    return {
        "temporal/foreground": _slot_mean(
            _bce(predictions["foreground"], foreground), shown, has_windows
        ),
        "temporal/l1": _slot_mean(distance, foreground, has_windows),
        "temporal/giou": _slot_mean(1.0 - giou, foreground, has_windows),
        "temporal/saliency": _saliency_loss(
            predictions["saliency"], targets["saliency"].astype(jnp.float32), shown, valid
        ),
    }


def _saliency_loss(
    logits: jax.Array, saliency: jax.Array, shown: jax.Array, valid: jax.Array
) -> WeightedSum:
    """BCE on labelled frames (saliency >= 0) and a hinge on every pair of clear order."""
    labelled = (saliency >= 0) & shown
    bce = _masked_mean(_bce(logits, jnp.clip(saliency, 0.0, 1.0)), labelled)
    higher = saliency[..., :, None] > saliency[..., None, :] + _RANK_GAP
    ranked = higher & labelled[..., :, None] & labelled[..., None, :]
    hinge = jax.nn.relu(_RANK_MARGIN - (logits[..., :, None] - logits[..., None, :]))
    flat = (*ranked.shape[:-2], -1)
    hinge = _masked_mean(hinge.reshape(flat), ranked.reshape(flat))
    return WeightedSum.of(bce + hinge, valid & jnp.any(labelled, axis=-1))


def _bce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy from logits, elementwise; labels in [0, 1]."""
    labels = labels.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * labels


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis of the entries in `mask`; 0 where there is none."""
    count = jnp.sum(mask, axis=-1)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(count, 1)


def _slot_mean(values: jax.Array, mask: jax.Array, slots: jax.Array) -> WeightedSum:
    return WeightedSum.of(_masked_mean(values, mask), slots & jnp.any(mask, axis=-1))


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """Windows after soft-NMS and the saliency curve.

    Returns: {"windows": [[start, end, score], ...] in seconds, best first, "saliency": [...] in
      [0, 1] for the valid frames, "times": [...] seconds of those frames}.
    """
    shown = np.asarray(clip.frame_valid, bool)
    scores = _sigmoid(prediction["foreground"][shown])
    spans = np.clip(prediction["spans"][shown].astype(np.float64), 0.0, 1.0)
    kept = soft_nms_1d(
        spans, scores, sigma=_NMS_SIGMA, min_score=_MIN_SCORE, limit=_MAX_WINDOWS
    )
    length = clip.end - clip.start
    return {
        "windows": [[clip.start + s * length, clip.start + e * length, p] for s, e, p in kept],
        "saliency": _sigmoid(prediction["saliency"][shown]).tolist(),
        "times": np.asarray(clip.times, np.float64)[shown].tolist(),
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


HEAD = Head(
    name="temporal",
    marker="<temporal>",
    routing_token="<time_begin>",
    slot_token="<temp>",
    module=TemporalHead,
    loss=loss,
    decode=decode,
)
