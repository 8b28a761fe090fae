"""Mask head: what the answer refers to, pixel by pixel in every frame, or that it is absent.

The slot reads its question, looks for its thing in each frame's tokens, tells the other frames
what it found and looks again, and becomes one query a frame. Mask logits are the query's match with
every cell of the frame, up-sampled, plus its dot products with finer pixel embeddings (as in
MaskFormer, Cheng et al. 2021, 2107.06278). The matches are also labelled as a distribution over
cells, as in the region head: that says *which* thing is meant long before its outline is any good.
Tracking is the same head with a box as the question: the tokens in the box, on the frame that it is
drawn on, say what to look for. Boxes are the extents of the masks.
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
    SlotQuery,
    cells_inside,
    frame_centres,
    position_waves,
)
from tpo_jax.models.layers import LayerNorm, Linear, Mlp, Rngs
from tpo_jax.models.vision import to_patches
from tpo_jax.parallel.weighted_sum import WeightedSum

# Of the focal loss, whose gamma is 2.
_FOCAL_ALPHA = 0.25


class MaskHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width, heads = config.head.width, config.head.heads
        self.pixel_width = width // 2
        self.stride = config.head.mask_stride
        self.stem_grid = config.vision.stem_grid
        self.mask_size = config.mask_size
        self.slot_query = SlotQuery(config, rngs=rngs)
        self.box_proj = Linear(width, width, rngs=rngs)
        self.frame_proj = Linear(2 * POSITION_OCTAVES, width, rngs=rngs)
        names = [f"layer{i}" for i in range(config.head.layers)]
        self.searches = nnx.Dict({name: SlotAttention(width, heads, rngs=rngs) for name in names})
        self.mixers = nnx.Dict({name: FrameMixer(width, heads, rngs=rngs) for name in names})
        self.final_norm = LayerNorm(width)
        self.query = Mlp(width, width, self.pixel_width + 1, rngs=rngs)
        self.presence = Linear(width, 1, rngs=rngs)
        # A cell reads its own pixels and the token around it; `cell_position` says where in it.
        self.raw_proj = Linear(3 * self.stride**2, self.pixel_width, rngs=rngs)
        self.token_proj = Linear(width, self.pixel_width, bias=False, rngs=rngs)
        self.pixel_out = Linear(self.pixel_width, self.pixel_width, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Returns logits, float32.

        "masks" [B, S, F, m, m], "cells" [B, S, F, h1, w1], "presence" [B, S, F].
        """
        B, F = inputs.frame_valid.shape
        S = inputs.slot_states.shape[1]
        tokens = inputs.tokens.reshape(B * F, *inputs.tokens.shape[2:])
        time = self.frame_proj(position_waves(frame_centres(inputs.frame_valid)[..., None]))
        x = self.slot_query(inputs)
        if inputs.boxes is not None:
            x = x + self._drawn(inputs)
        x = x[:, :, None] + time[:, None]
        for name, search in self.searches.items():
            found = search(jnp.swapaxes(x, 1, 2).reshape(B * F, S, -1), tokens)
            x = jnp.swapaxes(found.reshape(B, F, S, -1), 1, 2)
            x = self.mixers[name](x, inputs.frame_valid)
        x = self.final_norm(x)
        cells = jnp.einsum("bsfc,bftc->bsft", x, inputs.tokens)
        cells = (cells * tokens.shape[-1] ** -0.5).reshape(
            B, S, F, self.stem_grid, self.stem_grid
        )
        query, offset = jnp.split(self.query(x), [self.pixel_width], axis=-1)
        # The output layer of the pixels is linear, so it is applied to the few queries instead:
        # q . (x W + b) = (q W^T) . x + q . b.
        offset = offset + query @ self.pixel_out.bias[...][:, None]
        query = query @ self.pixel_out.merged_kernel.T
        pixels = self._pixels(inputs.frames, tokens)
        fine = jnp.einsum("bsfc,bfpc->bsfp", query, pixels) + offset
        m = self.mask_size
        up = jnp.asarray(bilinear_weights(self.stem_grid, m), cells.dtype)
        return {
            "masks": fine.reshape(B, S, F, m, m) + _resample(cells, up),
            "cells": cells,
            "presence": self.presence(x)[..., 0],
        }

    def _drawn(self, inputs: HeadInputs) -> jax.Array:
        """float32[B, S, C]: what stands in the user's box on its frame, 0 without a box."""
        shares = cells_inside(inputs.boxes, self.stem_grid, self.stem_grid)
        # All frames, the others with shares of zero: a gather would copy a frame per slot, and sum
        # its gradient in another order.
        there = jax.nn.one_hot(inputs.box_frame, inputs.tokens.shape[1])
        shares = there[..., None] * shares[:, :, None]
        found = jnp.einsum("bsft,bftc->bsc", shares, inputs.tokens)
        return jnp.where(inputs.box_valid[..., None], self.box_proj(found), 0.0)

    def _pixels(self, frames: jax.Array, tokens: jax.Array) -> jax.Array:
        """Cells before `pixel_out`, float32[B, F, m*m, C/2]; `tokens` float32[B*F, h1*w1, C]."""
        B, F = frames.shape[:2]
        m, grid = self.mask_size, self.stem_grid
        raw = self.raw_proj(to_patches(frames, self.stride)).reshape(B * F, m, m, -1)
        context = self.token_proj(tokens).reshape(B * F, grid, grid, -1)
        context = resize_grid(context, m)
        return jax.nn.gelu(raw + context, approximate=True).reshape(B, F, m * m, -1)


def resize_grid(x: jax.Array, size: int) -> jax.Array:
    """Bilinear float32[rows, h, h, C] -> float32[rows, size, size, C], half-pixel centres."""
    rows, h, _, C = x.shape
    weights = jnp.asarray(bilinear_weights(h, size), x.dtype)
    # As batched products of matrices in the order they lie in memory, without a transpose.
    x = jnp.broadcast_to(weights, (rows * h, size, h)) @ x.reshape(rows * h, h, C)
    x = jnp.broadcast_to(weights, (rows, size, h)) @ x.reshape(rows, h, size * C)
    return x.reshape(rows, size, size, C)


def bilinear_weights(size_in: int, size_out: int) -> np.ndarray:
    """float64[size_out, size_in], rows sum to 1: bilinear resampling with half-pixel centres."""
    position = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    position = np.clip(position, 0, size_in - 1)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(size_in)))


def area_weights(size_in: int, size_out: int) -> np.ndarray:
    """float64[size_out, size_in], rows sum to 1: the mean over what each output cell covers."""
    edges_in, edges_out = np.arange(size_in + 1) / size_in, np.arange(size_out + 1) / size_out
    low = np.maximum(edges_out[:-1, None], edges_in[:-1])
    high = np.minimum(edges_out[1:, None], edges_in[1:])
    return np.maximum(high - low, 0.0) * size_out


def _resample(x: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[..., h, h] -> float32[..., n, n] with weights float32[n, h] along both sides."""
    return jnp.einsum("nh,...hw,mw->...nm", weights, x, weights)


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """Focal on labelled frames, BCE on presence; where the object is present, dice and the
    cross-entropy of the cells (nats) against the share of the object that lies in each.

    One unit of weight a labelled frame.

    Args:
      predictions: "masks" float32[B, S, F, m, m], "cells" float32[B, S, F, h1, w1] and "presence"
        float32[B, S, F], all logits.
      targets: "masks" [B, S, F, m, m], above 0 inside; "labelled" bool[B, S, F].
      valid: bool[B, S], slots in use.
    """
    logits = predictions["masks"]
    logits = logits.reshape(*logits.shape[:3], -1)
    masks = (targets["masks"] > 0).astype(jnp.float32).reshape(logits.shape)
    labelled = targets["labelled"] & valid[..., None]
    present = jnp.any(masks > 0, axis=-1)
    cells = predictions["cells"]
    shrink = jnp.asarray(area_weights(targets["masks"].shape[-1], cells.shape[-1]), jnp.float32)
    share = _resample(masks.reshape(targets["masks"].shape), shrink).reshape(*masks.shape[:3], -1)
    share = share / jnp.maximum(jnp.sum(share, axis=-1, keepdims=True), 1e-6)
    matches = jax.nn.log_softmax(cells.reshape(share.shape))
    presence = predictions["presence"]
    presence = jax.nn.softplus(presence) - presence * present
    return {
        "mask/focal": WeightedSum.of(focal_loss(logits, masks), labelled),
        "mask/dice": WeightedSum.of(dice_loss(logits, masks), labelled & present),
        "mask/cells": WeightedSum.of(-jnp.sum(share * matches, axis=-1), labelled & present),
        "mask/presence": WeightedSum.of(presence, labelled),
    }


def focal_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Mean over the last axis of float[..., n], masks in {0, 1} (Lin et al. 2017, 1708.02002)."""
    bce = jax.nn.softplus(logits) - logits * masks
    chance = jax.nn.sigmoid(logits)
    miss = chance + masks - 2.0 * chance * masks
    alpha = _FOCAL_ALPHA * masks + (1.0 - _FOCAL_ALPHA) * (1.0 - masks)
    return jnp.mean(alpha * jnp.square(miss) * bce, axis=-1)


def dice_loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """logits and masks in {0, 1}, both float[..., n] -> float[...]: one minus twice the shared over
    the summed area, each plus one."""
    chance = jax.nn.sigmoid(logits)
    shared = jnp.sum(chance * masks, axis=-1)
    return 1.0 - (2.0 * shared + 1.0) / (jnp.sum(chance, -1) + jnp.sum(masks, -1) + 1.0)


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """Masks at the size of the video, and their boxes.

    Returns: "masks" bool[n, height, width] (a numpy array, ready for RLE), "boxes" [[x1, y1, x2,
      y2] normalised or None, ...], "presence" [probability, ...], "times" [seconds, ...], for the
      n valid frames. A frame is empty (box None) when the object is called absent.
    """
    shown = np.asarray(clip.frame_valid, bool)
    logits = np.asarray(prediction["masks"], np.float64)[shown]
    presence = 1.0 / (1.0 + np.exp(-np.asarray(prediction["presence"], np.float64)[shown]))
    rows = bilinear_weights(logits.shape[1], clip.height)
    columns = bilinear_weights(logits.shape[2], clip.width)
    masks = np.einsum("ah,nhw,bw->nab", rows, logits, columns, optimize=True) > 0.0
    masks &= (presence > 0.5)[:, None, None]
    return {
        "masks": masks,
        "boxes": [mask_extent(mask) for mask in masks],
        "presence": presence.tolist(),
        "times": np.asarray(clip.times, np.float64)[shown].tolist(),
    }


def mask_extent(mask: np.ndarray) -> list[float] | None:
    """Tight normalised xyxy box of a bool[h, w] mask, None if it is empty."""
    if not mask.any():
        return None
    h, w = mask.shape
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [xs[0] / w, ys[0] / h, (xs[-1] + 1) / w, (ys[-1] + 1) / h]


HEAD = Head(
    name="mask",
    marker="<mask>",
    routing_token="<track_begin>",
    slot_token="<tracking>",
    module=MaskHead,
    loss=loss,
    decode=decode,
    reads_tokens=True,
    reads_prompt=True,
    whole_video="spread",
)
