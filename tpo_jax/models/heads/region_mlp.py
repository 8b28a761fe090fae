"""Region head of Task Preference Optimization (2412.19326): a box from the slot state alone.

Two linear layers and nothing that sees: what the language model knows of the place is all there is,
and of the clip it was shown a few tokens. It is here so that published weights run; `region`, which
looks at the frame, finds more. The release answers about images, so `frame` is not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import region
from tpo_jax.models.heads.base import ClipInfo, Head, HeadInputs
from tpo_jax.models.heads.geometry import box_giou
from tpo_jax.models.layers import Mlp, Rngs
from tpo_jax.parallel.weighted_sum import WeightedSum

NAME = "region_mlp"


class RegionMlpHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width = config.language.width
        self.mlp = Mlp(width, width // 2, 4, rngs=rngs, activation=jax.nn.relu)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """-> {"boxes": float32[B, S, 4]} xyxy, normalised; without bounds, corners in any order."""
        return {"boxes": self.mlp(inputs.slot_states)}


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """L1 (sum over the four coordinates) and 1 - GIoU; one unit of weight a valid slot.

    The release leaves boxes with corners in the wrong order out of the second, so that they have no
    gradient from it; here their corners are ordered.

    Args:
      predictions: "boxes" float32[B, S, 4] xyxy, normalised, corners in any order.
      targets: "boxes" [B, S, 4] xyxy, normalised.
      valid: bool[B, S], slots in use.
    """
    boxes, wanted = predictions["boxes"], targets["boxes"].astype(jnp.float32)
    # Filled slots have no box; any non-degenerate one keeps their (unused) gradient finite.
    wanted = jnp.where(valid[..., None], wanted, jnp.array([0.25, 0.25, 0.75, 0.75]))
    _, giou = box_giou(boxes, wanted)
    return {
        f"{NAME}/l1": WeightedSum.of(jnp.sum(jnp.abs(boxes - wanted), axis=-1), valid),
        f"{NAME}/giou": WeightedSum.of(1.0 - giou, valid),
    }


def published_weights() -> dict[str, float]:
    """Those of the release: 2 x the mean over coordinates, which are four, and 0.2 x GIoU."""
    return {f"{NAME}/l1": 0.5, f"{NAME}/giou": 0.2}


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """As `region.decode`, of the box float[4] with its corners in order."""
    one, other = np.asarray(prediction["boxes"]).reshape(2, 2)
    corners = np.concatenate([np.minimum(one, other), np.maximum(one, other)])
    return region.decode({"boxes": corners}, clip)


HEAD = Head(
    name=NAME,
    task="region",
    marker=region.HEAD.marker,
    routing_token=region.HEAD.routing_token,
    slot_token=region.HEAD.slot_token,
    module=RegionMlpHead,
    loss=loss,
    decode=decode,
)
