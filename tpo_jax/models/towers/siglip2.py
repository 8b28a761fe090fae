"""SigLIP 2's tower for any aspect ratio (NaFlex): SigLIP's layers, patches as a linear layer.

Tschannen et al. 2025 (2502.14786); layout of `transformers`' Siglip2VisionModel. The position table
is resized to each image's grid with anti-aliasing. All frames of a call have one size, so no patch
is padding. SigLIP 2 checkpoints of a fixed resolution have SigLIP's layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import LayerNorm, Linear, Rngs, stack
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.encoder import EncoderLayer, features, run_stack, whole_patches
from tpo_jax.models.towers.interpolate import resize_positions
from tpo_jax.models.vision import VisionFeatures, to_patches


class Siglip2Tower(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.config = config
        self.patch_embedding = Linear(3 * config.patch_size**2, config.width, rngs=rngs)
        draw = jax.random.normal(rngs.params(), (config.grid**2, config.width), jnp.float32)
        self.position_embedding = nnx.Param(draw * config.width**-0.5)
        self.layers = stack(lambda rngs: EncoderLayer(config, rngs=rngs), config.depth, rngs)
        # Part of the published weights; the language model sees what comes before it.
        self.post_layernorm = LayerNorm(config.width, epsilon=config.epsilon)

    def __call__(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """float[B, F, H, W, 3] normalised, bool[B, F] -> features; any H and W of whole patches."""
        stem, x, _ = self.run(frames, frame_valid)
        return features(stem, x)

    def run(
        self, frames: jax.Array, frame_valid: jax.Array, *, keep: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What `__call__` reads -> stem float[B, F, h, w, D], the output float[B, F, h * w, D] and
        with `keep` all hidden states float[depth + 1, B, F, h * w, D]."""
        p = self.config.patch_size
        stem = self.patch_embedding(to_patches(whole_patches(frames, p), p))
        h, w, D = stem.shape[2:]
        positions = resize_positions(
            self.position_embedding[...], (h, w), "linear", antialias=True
        )
        x = stem.reshape(*stem.shape[:2], h * w, D) + positions.astype(stem.dtype)
        return stem, *run_stack(self.layers, self.config, x, frame_valid, keep=keep)
