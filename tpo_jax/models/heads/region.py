"""Region head: the box of what the answer refers to, on one frame.

The slot reads its question, gathers context from the tokens of the chosen frame, becomes a query,
and is matched with every cell of that frame. The matches are a distribution over cells: its mean is
the centre of the box and its spread the size (the soft-argmax of Nibali et al. 2018, 1801.07372),
both corrected by a small readout. The cells inside the wanted box are labels for the matches
themselves, which says *which* thing is meant long before a box is any good.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.base import (
    ClipInfo,
    Head,
    HeadInputs,
    SlotAttention,
    SlotQuery,
    cell_centres,
    cells_inside,
)
from tpo_jax.models.heads.geometry import box_cxcywh_to_xyxy, box_giou
from tpo_jax.models.layers import LayerNorm, Mlp, Rngs
from tpo_jax.parallel.weighted_sum import WeightedSum

# Standard deviation of a uniform distribution over an interval is its length / sqrt(12).
_UNIFORM_WIDTH = 12**0.5
# Keeps the square root's gradient finite where one cell has all the weight.
_MIN_VARIANCE = 1e-4
# Furthest that the readout moves a centre, as a share of the frame.
_MAX_SHIFT = 0.1


class RegionHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width = config.head.width
        self.slot_query = SlotQuery(config, rngs=rngs)
        self.layers = nnx.Dict(
            {
                f"layer{i}": SlotAttention(width, config.head.heads, rngs=rngs)
                for i in range(config.head.layers)
            }
        )
        self.final_norm = LayerNorm(width)
        self.readout = Mlp(2 * width + 4, width, 4, rngs=rngs)
        self.grid = config.vision.stem_grid

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """-> {"boxes": float32[B, S, 4] xyxy, normalised, "cells": float32[B, S, h1, w1] logits}"""
        B, S, _ = inputs.slot_states.shape
        rows = jnp.arange(B)[:, None]
        # One frame a slot: slots of one row may ask about different frames.
        tokens = inputs.tokens[rows, inputs.frame].reshape(B * S, *inputs.tokens.shape[2:])
        x = self.slot_query(inputs).reshape(B * S, 1, -1)
        for layer in self.layers.values():
            x = layer(x, tokens)
        query = self.final_norm(x)[:, 0]
        cells = jnp.einsum("rc,rtc->rt", query, tokens) * tokens.shape[-1] ** -0.5
        boxes = self._boxes(query, tokens, jax.nn.softmax(cells))
        return {
            "boxes": boxes.reshape(B, S, 4),
            "cells": cells.reshape(B, S, self.grid, self.grid),
        }

    def _boxes(self, query: jax.Array, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        """query float32[r, C], tokens float32[r, t, C], weights float32[r, t] -> float32[r, 4]."""
        places = cell_centres(self.grid, self.grid)
        mean = weights @ places
        spread = jnp.sqrt(jnp.maximum(weights @ places**2 - mean**2, 0.0) + _MIN_VARIANCE)
        found = jnp.einsum("rt,rtc->rc", weights, tokens)
        correction = self.readout(jnp.concatenate([found, query, mean, spread], axis=-1))
        centre = mean + _MAX_SHIFT * jnp.tanh(correction[:, :2])
        size = _UNIFORM_WIDTH * spread * jnp.exp(correction[:, 2:])
        return box_cxcywh_to_xyxy(jnp.concatenate([centre, size], axis=-1))


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """L1 (sum over the four coordinates), 1 - GIoU and cross-entropy over cells (nats).

    One unit of weight a valid slot.

    Args:
      predictions: "boxes" float32[B, S, 4] xyxy, normalised; "cells" float32[B, S, h1, w1] logits.
      targets: "boxes" [B, S, 4] xyxy, normalised.
      valid: bool[B, S], slots in use.
    """
    boxes, wanted = predictions["boxes"], targets["boxes"].astype(jnp.float32)
    # Filled slots have no box; any non-degenerate one keeps their (unused) gradient finite.
    wanted = jnp.where(valid[..., None], wanted, jnp.array([0.25, 0.25, 0.75, 0.75]))
    _, giou = box_giou(boxes, wanted)
    distance = jnp.sum(jnp.abs(boxes - wanted), axis=-1)
    cells = predictions["cells"]
    labels = cells_inside(wanted, *cells.shape[-2:])
    matches = jax.nn.log_softmax(cells.reshape(labels.shape))
    return {
        "region/l1": WeightedSum.of(distance, valid),
        "region/giou": WeightedSum.of(1.0 - giou, valid),
        "region/cells": WeightedSum.of(-jnp.sum(labels * matches, axis=-1), valid),
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
    reads_tokens=True,
    reads_prompt=True,
)
