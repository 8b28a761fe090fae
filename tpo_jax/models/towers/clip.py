"""CLIP's vision tower: a class token before the patches, normalised before the first layer.

Radford et al. 2021 (2103.00020); layout of `transformers`' CLIPVisionModel.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import LayerNorm, Rngs, stack
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.encoder import EncoderLayer, PatchEmbedding, features, run_stack
from tpo_jax.models.towers.interpolate import resize_positions
from tpo_jax.models.vision import VisionFeatures


class ClipTower(nnx.Module):
    def __init__(
        self, config: TowerConfig, *, rngs: Rngs, layer: Callable[..., nnx.Module] = EncoderLayer
    ):
        """`layer`: class of the layers, `layer(config, rngs=rngs)`."""
        self.config = config
        self.patch_embedding = PatchEmbedding(config, bias=False, rngs=rngs)

        def table(*shape: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), shape, jnp.float32)
            return nnx.Param(draw * config.width**-0.5)

        self.class_embedding = table(config.width)
        self.position_embedding = table(config.grid**2 + 1, config.width)
        self.pre_layernorm = LayerNorm(config.width, epsilon=config.epsilon)
        self.layers = stack(lambda rngs: layer(config, rngs=rngs), config.depth, rngs)
        # Part of the published weights; the language model sees what comes before it.
        self.post_layernorm = LayerNorm(config.width, epsilon=config.epsilon)

    def __call__(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """float[B, F, H, W, 3] normalised, bool[B, F] -> features with the class token."""
        stem, x, _ = self.run(frames, frame_valid)
        return features(stem, x[:, :, 1:], x[:, :, 0])

    def run(
        self, frames: jax.Array, frame_valid: jax.Array, *, keep: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What `__call__` reads -> stem float[B, F, h, w, D], the output float[B, F, 1 + h * w, D]
        and with `keep` all hidden states float[depth + 1, B, F, 1 + h * w, D]."""
        stem = self.patch_embedding(frames)
        B, F, h, w, D = stem.shape
        table = self.position_embedding[...]
        positions = jnp.concatenate([table[:1], resize_positions(table[1:], (h, w), "cubic")])
        first = jnp.broadcast_to(self.class_embedding[...].astype(stem.dtype), (B, F, 1, D))
        x = jnp.concatenate([first, stem.reshape(B, F, h * w, D)], axis=2)
        x = self.pre_layernorm(x + positions.astype(x.dtype))
        return stem, *run_stack(self.layers, self.config, x, frame_valid, keep=keep)
