"""LanguageBind's two towers (Zhu et al. 2023, 2310.01852), which Video-LLaVA reads.

Both are CLIP ViT-L/14. Layers of the video tower first add a learnt embedding of the frame and
attend over time at each patch (and at the class token). `transformers`' Video-LLaVA has no such
layers: its converter leaves them out, and `frames=0` is that model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import LayerNorm, Rngs
from tpo_jax.models.towers.clip import ClipTower
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.encoder import EncoderLayer
from tpo_jax.models.vision import SelfAttention, VisionFeatures


class TemporalLayer(nnx.Module):
    """CLIP's layer with attention over the frames of a clip before it."""

    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        draw = jax.random.normal(rngs.params(), (1, config.frames, config.width), jnp.float32)
        self.temporal_embedding = nnx.Param(draw * config.width**-0.5)
        self.temporal_layer_norm1 = LayerNorm(config.width, epsilon=config.epsilon)
        self.temporal_attn = SelfAttention(config.width, config.heads, rngs=rngs)
        self.spatial = EncoderLayer(config, rngs=rngs)

    def __call__(self, x: jax.Array, frame_valid: jax.Array) -> jax.Array:
        """float[B, F, n, D], bool[B, F] -> float[B, F, n, D]."""
        B, F, n, D = x.shape
        x = x + self.temporal_embedding[...][0, :F, None].astype(x.dtype)
        rows = jnp.swapaxes(self.temporal_layer_norm1(x), 1, 2).reshape(B * n, F, D)
        over_time = self.temporal_attn(rows, jnp.repeat(frame_valid, n, axis=0))
        x = x + jnp.swapaxes(over_time.reshape(B, n, F, D), 1, 2)
        return self.spatial(x, frame_valid)


class LanguageBindTower(nnx.Module):
    """A clip of one frame is an image and goes through the image tower, without a class token."""

    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.config = config
        still = dataclasses.replace(config, frames=0)
        self.image_tower = ClipTower(still, rngs=rngs)
        layer = TemporalLayer if config.frames else EncoderLayer
        self.video_tower = ClipTower(config, rngs=rngs, layer=layer)

    def __call__(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """float[B, F, H, W, 3] normalised, bool[B, F] -> features."""
        if frames.shape[1] == 1:
            found = self.image_tower(frames, frame_valid)
            return VisionFeatures(found.stem, found.patches)
        if self.config.frames and frames.shape[1] > self.config.frames:
            raise ValueError(
                f"vision: clip of {frames.shape[1]} frames, but the time embedding has "
                f"{self.config.frames} (vision.frames); give the bucket at most as many"
            )
        return self.video_tower(frames, frame_valid)
