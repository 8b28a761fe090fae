"""Prompt encoder of SAM 2: points, boxes and masks as tokens and cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.heads.sam2.layers import Conv, FourierPositions, table
from tpo_jax.models.layers import LayerNorm, Rngs
from tpo_jax.models.sam2_config import FEATURE_STRIDE, Sam2Config

# Labels of points. A box is its two corners; FILLING is a point that is none.
FILLING, BACKGROUND, FOREGROUND, CORNER_1, CORNER_2 = -1, 0, 1, 2, 3


class MaskEmbedding(nnx.Module):
    """Mask logits at the size of the decoder's masks as cells of the feature grid."""

    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        quarter, channels = config.mask_channels // 4, config.mask_channels
        self.conv1 = Conv(1, quarter, 2, stride=2, rngs=rngs)
        self.layer_norm1 = LayerNorm(quarter)
        self.conv2 = Conv(quarter, channels, 2, stride=2, rngs=rngs)
        self.layer_norm2 = LayerNorm(channels)
        self.conv3 = Conv(channels, config.width, 1, rngs=rngs)

    def __call__(self, masks: jax.Array) -> jax.Array:
        """float[..., m, m] -> float[..., m/4, m/4, C]."""
        x = self.layer_norm1(self.conv1(masks[..., None]))
        x = self.layer_norm2(self.conv2(jax.nn.gelu(x, approximate=False)))
        return self.conv3(jax.nn.gelu(x, approximate=False))


class PromptEncoder(nnx.Module):
    def __init__(self, config: Sam2Config, frequencies: jax.Array, *, rngs: Rngs):
        """frequencies: key[], which those of the image's places are drawn from."""
        self.image_size = config.image_size
        self.positions = FourierPositions(config.width, frequencies)
        self.labels = table(rngs, 4, config.width)  # of BACKGROUND to CORNER_2
        self.filling = table(rngs, 1, config.width)
        self.no_mask = table(rngs, 1, config.width)
        self.mask_embedding = MaskEmbedding(config, rngs=rngs)

    def points(self, points: jax.Array, labels: jax.Array) -> jax.Array:
        """Tokens float32[..., n, C] of points float32[..., n, 2] in pixels of the input image and
        their labels int32[..., n]. Boxes count as two points; the published model puts one FILLING
        behind what the user gives."""
        places = (points + 0.5) / self.image_size
        tokens = self.positions(places) + self.labels[...][jnp.maximum(labels, 0)]
        return jnp.where((labels == FILLING)[..., None], self.filling[0], tokens)

    def boxes(self, boxes: jax.Array) -> jax.Array:
        """Tokens float32[..., 3, C] of boxes float32[..., 4], xyxy in pixels of the input image."""
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
        points = jnp.concatenate([corners, jnp.zeros_like(corners[..., :1, :])], axis=-2)
        labels = jnp.array([CORNER_1, CORNER_2, FILLING], jnp.int32)
        return self.points(points, jnp.broadcast_to(labels, points.shape[:-1]))

    def masks(self, masks: jax.Array | None) -> jax.Array:
        """Cells float32[..., h, w, C] of mask logits float32[..., 4h, 4w], or one for no mask."""
        if masks is None:
            cells = self.image_size // FEATURE_STRIDE
            return jnp.broadcast_to(self.no_mask[0], (cells, cells, self.no_mask.shape[-1]))
        return self.mask_embedding(masks)
