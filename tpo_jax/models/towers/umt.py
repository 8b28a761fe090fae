"""UMT-L/16, the video encoder of VideoChat2 (Li et al. 2023, 2303.16058).

One sequence holds the patches of all frames and attends to itself. Positions are fixed sines and
cosines over the flat index (frame, row, column), for the `frames` of the pre-training; a clip of
another length gets that table interpolated in time, an image its first frame. There is no class
token; `post_layernorm` is the layer that VideoChat2 calls vision_layernorm. Layout of OpenGVLab's
modeling_vit.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.layers import LayerNorm, Linear, Rngs, stack
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.encoder import PatchEmbedding, TowerMlp, features, run_stack
from tpo_jax.models.towers.interpolate import resize_matrix
from tpo_jax.models.vision import VisionFeatures

POST_EPSILON = 1e-12


def position_table(config: TowerConfig, frames: int) -> np.ndarray:
    """float32[frames, grid * grid, D]."""
    places, width = config.grid**2, config.width
    trained = 1 if frames == 1 else config.frames
    exponents = 2 * (np.arange(width) // 2) / width
    angles = np.arange(trained * places)[:, None] / 10000.0**exponents
    table = np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))
    table = table.reshape(trained, places * width).astype(np.float32)
    return (resize_matrix(frames, trained) @ table).reshape(frames, places, width)


class FusedAttention(nnx.Module):
    """Attention whose queries, keys and values are one matrix; keys have no bias."""

    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.qkv = Linear(config.width, 3 * config.width, rngs=rngs, bias=False)
        self.q_bias = nnx.Param(jnp.zeros(config.width, jnp.float32))
        self.v_bias = nnx.Param(jnp.zeros(config.width, jnp.float32))
        self.proj = Linear(config.width, config.width, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """float[B, T, D], bool[B, T] -> float[B, T, D]."""
        B, T, D = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, v = q + self.q_bias[...].astype(x.dtype), v + self.v_bias[...].astype(x.dtype)
        q, k, v = (y.reshape(B, T, self.heads, D // self.heads) for y in (q, k, v))
        out = attention(
            q, k, v, q_segments=jnp.ones((B, T), jnp.int32), kv_segments=valid.astype(jnp.int32)
        )
        return self.proj(out.reshape(B, T, D))


class UmtLayer(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.norm1 = LayerNorm(config.width, epsilon=config.epsilon)
        self.attn = FusedAttention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.width, epsilon=config.epsilon)
        self.mlp = TowerMlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, frame_valid: jax.Array) -> jax.Array:
        """float[B, F * p, D], bool[B, F] -> float[B, F * p, D]."""
        valid = jnp.repeat(frame_valid, x.shape[1] // frame_valid.shape[1], axis=1)
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


class UmtTower(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.config = config
        self.patch_embedding = PatchEmbedding(config, bias=True, rngs=rngs)
        self.layers = stack(lambda rngs: UmtLayer(config, rngs=rngs), config.depth, rngs)
        self.post_layernorm = LayerNorm(config.width, epsilon=POST_EPSILON)

    def __call__(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """float[B, F, S, S, 3] normalised with S = image_size, bool[B, F] -> features."""
        stem, x, _ = self.run(frames, frame_valid)
        return features(stem, self.post_layernorm(x))

    def run(
        self, frames: jax.Array, frame_valid: jax.Array, *, keep: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What `__call__` reads -> stem float[B, F, h, w, D], the output float[B, F * h * w, D]
        before its norm and with `keep` all hidden states float[depth + 1, B, F * h * w, D]."""
        stem = self.patch_embedding(frames)
        B, F, h, w, D = stem.shape
        if (h, w) != (self.config.grid, self.config.grid):
            raise ValueError(
                f"vision: frames of {frames.shape[2]} x {frames.shape[3]} pixels, but "
                f"vision.image_size={self.config.image_size} fixes the positions of umt"
            )
        positions = jnp.asarray(position_table(self.config, F), stem.dtype)
        x = (stem.reshape(B, F, h * w, D) + positions).reshape(B, F * h * w, D)
        return stem, *run_stack(self.layers, self.config, x, frame_valid, keep=keep)
