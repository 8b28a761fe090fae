"""Losses of SAM 2: masks, their predicted IoU and presence in every labelled frame, tracked and
frame by frame; and what the release of Task Preference Optimization (2412.19326) trains with, the
distance to the prompt of the labelled box and to the box itself.

Of the three masks of an open prompt only the best is corrected, as in the paper; predicted IoUs are
corrected for all of them. Frames without the object have no mask and no IoU.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tpo_jax.models.heads.mask import dice_loss, focal_loss
from tpo_jax.parallel.weighted_sum import WeightedSum

NAME = "sam2"
# Of the release's training configuration, and what chooses the best of three masks.
_FOCAL, _DICE, _IOU, _PRESENCE = 20.0, 1.0, 1.0, 1.0
# The whole mask objective of the release of Task Preference Optimization.
PROMPT_TERMS = (f"{NAME}/prompt", f"{NAME}/box")
# Every coordinate of the box of an object that is absent, as published.
_ABSENT = -1.0


def published_weights() -> dict[str, float]:
    """Those of SAM 2 for every frame, tracked or by itself, and of Task Preference Optimization for
    the adapter's tokens and the box."""
    terms = {"focal": _FOCAL, "dice": _DICE, "iou": _IOU, "presence": _PRESENCE}
    weights = {f"{NAME}/{kind}{t}": w for kind in ("", "still_") for t, w in terms.items()}
    return weights | dict.fromkeys(PROMPT_TERMS, 1.0)


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """One unit of weight a labelled frame.

    `prompt` and `box`, means over tokens and over coordinates, have one a slot whose prompted frame
    shows the object. Where no labelled frame does, there is no prompt, and each coordinate of the
    box is to be -1; where only others do, neither is known.

    Args:
      predictions: of M candidates a frame, tracked and, with "still_" before the name, by itself:
        "candidates" float32[B, S, F, M, m, m] logits, "iou" float32[B, S, F, M], "presence"
        float32[B, S, F] logits, "asked" bool[B, S, F, M]; "prompt_error" float32[B, S]; "box" and
        "labelled_box" float32[B, S, 4], xyxy in [0, 1], the latter 0 without a mask.
      targets: "masks" [B, S, F, m, m], above 0 inside; "labelled" bool[B, S, F].
      valid: bool[B, S], slots in use.
    """
    masks = (targets["masks"] > 0).astype(jnp.float32)
    labelled = targets["labelled"] & valid[..., None]
    present = labelled & jnp.any(masks > 0, axis=(-2, -1))
    terms = {}
    for kind in ("", "still_"):
        found = {
            name: predictions[f"{kind}{name}"]
            for name in ("candidates", "iou", "presence", "asked")
        }
        for name, value in _of_frames(found, masks).items():
            weights = labelled if name == "presence" else present
            terms[f"{NAME}/{kind}{name}"] = WeightedSum.of(value, weights)
    seen, boxes = jnp.any(present, axis=-1), predictions["labelled_box"]
    shown = seen & jnp.any(boxes > 0, axis=-1)
    absent = jnp.any(labelled, axis=-1) & ~seen
    wanted = jnp.where(shown[..., None], boxes, _ABSENT)
    box_error = jnp.mean(jnp.abs(predictions["box"] - wanted), axis=-1)
    terms[f"{NAME}/prompt"] = WeightedSum.of(predictions["prompt_error"], shown)
    terms[f"{NAME}/box"] = WeightedSum.of(box_error, shown | absent)
    return terms


def _of_frames(found: Mapping[str, jax.Array], masks: jax.Array) -> dict[str, jax.Array]:
    """Every term of every frame, float32[B, S, F] each; masks float32[B, S, F, m, m]."""
    logits = found["candidates"].reshape(*found["iou"].shape, -1)
    wanted = masks.reshape(*masks.shape[:3], 1, -1)
    asked = found["asked"]
    focal, dice = focal_loss(logits, wanted), dice_loss(logits, wanted)
    cost = jnp.where(asked, _FOCAL * focal + _DICE * dice, jnp.inf)
    best = jnp.argmin(jax.lax.stop_gradient(cost), axis=-1, keepdims=True)
    error = jnp.abs(found["iou"] - overlap(logits, wanted)) * asked
    presence = found["presence"]
    there = jnp.any(masks > 0, axis=(-2, -1))
    return {
        "focal": jnp.take_along_axis(focal, best, axis=-1)[..., 0],
        "dice": jnp.take_along_axis(dice, best, axis=-1)[..., 0],
        "iou": jnp.sum(error, axis=-1) / jnp.sum(asked, axis=-1),
        "presence": jax.nn.softplus(presence) - presence * there,
    }


def overlap(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """IoU float32[...] of what logits float[..., n] call inside with masks float[..., n] in {0, 1};
    0 where both are empty."""
    inside = (logits > 0).astype(jnp.float32)
    both = jnp.sum(inside * masks, axis=-1)
    either = jnp.sum(jnp.maximum(inside, masks), axis=-1)
    return both / jnp.maximum(either, 1.0)
