"""Region head: the box of what the answer refers to, on one frame.

The slot state queries the tokens of the chosen frame (cross-attention) and is read out as centre
and size through a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.base import ClipInfo, FrameTokens, Head, HeadInputs, SlotAttention
from tpo_jax.models.heads.geometry import box_cxcywh_to_xyxy, box_giou
from tpo_jax.models.layers import LayerNorm, Linear, Mlp, Rngs
from tpo_jax.parallel.weighted_sum import WeightedSum


class RegionHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width = config.head.width
        self.tokens = FrameTokens(config, rngs=rngs)
        self.slot_proj = Linear(config.language.width, width, rngs=rngs)
        self.layers = nnx.Dict(
            {
                f"layer{i}": SlotAttention(width, config.head.heads, rngs=rngs)
                for i in range(config.head.layers)
            }
        )
        self.final_norm = LayerNorm(width)
        self.readout = Mlp(width, width, 4, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """-> {"boxes": float32[B, S, 4] xyxy, normalised}."""
        B, S, _ = inputs.slot_states.shape
        rows = jnp.arange(B)[:, None]
        # One frame a slot: slots of one row may ask about different frames.
        chosen = jax.tree.map(lambda x: x[rows, inputs.frame], inputs.features)
        tokens = self.tokens(jax.tree.map(lambda x: x.reshape(B * S, *x.shape[2:]), chosen))
        x = self.slot_proj(inputs.slot_states).reshape(B * S, 1, -1)
        for layer in self.layers.values():
            x = layer(x, tokens)
        box = jax.nn.sigmoid(self.readout(self.final_norm(x)))
        return {"boxes": box_cxcywh_to_xyxy(box).reshape(B, S, 4)}


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """L1 (sum over the four coordinates) and 1 - GIoU, one unit of weight a valid slot."""
    boxes, wanted = predictions["boxes"], targets["boxes"].astype(jnp.float32)
    # Filled slots have no box; any non-degenerate one keeps their (unused) gradient finite.
    wanted = jnp.where(valid[..., None], wanted, jnp.array([0.25, 0.25, 0.75, 0.75]))
    _, giou = box_giou(boxes, wanted)
    distance = jnp.sum(jnp.abs(boxes - wanted), axis=-1)
    return {
        "region/l1": WeightedSum.of(distance, valid),
        "region/giou": WeightedSum.of(1.0 - giou, valid),
    }


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """-> {"box": [x1, y1, x2, y2] normalised, "box_pixels": in pixels, "time": seconds}."""
    box = np.clip(np.asarray(prediction["boxes"], np.float64), 0.0, 1.0)
    pixels = box * np.array([clip.width, clip.height, clip.width, clip.height])
    return {
        "box": box.tolist(),
        "box_pixels": pixels.tolist(),
        "time": float(clip.times[clip.frame]),
    }


HEAD = Head(
    name="region",
    marker="<region>",
    routing_token="<box_begin>",
    slot_token="<boxes>",
    module=RegionHead,
    loss=loss,
    decode=decode,
)
