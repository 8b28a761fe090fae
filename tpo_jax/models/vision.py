"""Video encoder: hierarchical patch stem, then blocks of divided space-time attention.

A still image is a clip of one frame.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.config import VisionConfig
from tpo_jax.models.layers import LayerNorm, Linear, Mlp, Rngs, run_layers, stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionFeatures:
    """What heads read.

    stem: float[B, F, h1, w1, C1], first stem level: fine, frame by frame.
    patches: float[B, F, h, w, D], after the blocks: coarse, knows its neighbours in space and time.
    class_token: float[B, F, D] of a tower that has one.
    """

    stem: jax.Array
    patches: jax.Array
    class_token: jax.Array | None = None


def to_patches(images: jax.Array, stride: int) -> jax.Array:
    """float[..., H, W, C] -> float[..., H/stride, W/stride, stride*stride*C], rows first."""
    *lead, H, W, C = images.shape
    x = images.reshape(*lead, H // stride, stride, W // stride, stride, C)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*lead, H // stride, W // stride, stride * stride * C)


def add_motion(frames: jax.Array) -> jax.Array:
    """float[B, F, H, W, 3] -> float[B, F, H, W, 6]: each frame and its change since the last one.

    A short-range tubelet, as in ViViT (Arnab et al. 2021, 2103.15691), whose two halves are a frame
    and a difference: movement is visible to the first layer. The first frame has not changed.
    """
    before = jnp.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    return jnp.concatenate([frames, frames - before], axis=-1)


class PatchEmbed(nnx.Module):
    """One stem level: non-overlapping patches and one matrix product, which is a strided conv."""

    def __init__(self, features_in: int, features_out: int, stride: int, *, rngs: Rngs):
        self.proj = Linear(stride * stride * features_in, features_out, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., H, W, C] -> float[..., H / stride, W / stride, features_out]."""
        return self.proj(to_patches(x, self.stride))


class SelfAttention(nnx.Module):
    """Bidirectional multi-head attention over the second axis of float[rows, T, D]."""

    def __init__(self, width: int, heads: int, *, rngs: Rngs, scale: float = 1.0):
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.o_proj = Linear(width, width, rngs=rngs, scale=scale)
        self.heads = heads

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """`valid` bool[rows, T]: keys that may be seen; a row without any averages its keys."""
        rows, T, D = x.shape
        q, k, v = (
            proj(x).reshape(rows, T, self.heads, D // self.heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if valid is None:
            out = attention(q, k, v)
        else:
            out = attention(
                q, k, v, q_segments=jnp.ones((rows, T), jnp.int32),
                kv_segments=valid.astype(jnp.int32),
            )  # fmt: skip
        return self.o_proj(out.reshape(rows, T, D))


class VisionBlock(nnx.Module):
    """Pre-norm block: attention over time (optional), over space, then an MLP."""

    def __init__(self, config: VisionConfig, *, rngs: Rngs):
        width, heads = config.width, config.heads
        # Keeps the variance of the residual stream independent of the depth.
        scale = (2.0 * config.depth) ** -0.5
        if config.temporal == "divided":
            self.temporal_norm = LayerNorm(width)
            self.temporal_attention = SelfAttention(width, heads, rngs=rngs, scale=scale)
        self.spatial_norm = LayerNorm(width)
        self.spatial_attention = SelfAttention(width, heads, rngs=rngs, scale=scale)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, config.mlp_width, width, rngs=rngs, scale=scale)
        self.temporal = config.temporal

    def __call__(self, x: jax.Array, frame_valid: jax.Array) -> jax.Array:
        """float[B, F, p, D], bool[B, F] -> float[B, F, p, D]."""
        B, F, p, D = x.shape
        if self.temporal == "divided":
            over_time = jnp.swapaxes(self.temporal_norm(x), 1, 2).reshape(B * p, F, D)
            valid = jnp.repeat(frame_valid, p, axis=0)
            over_time = self.temporal_attention(over_time, valid).reshape(B, p, F, D)
            x = x + jnp.swapaxes(over_time, 1, 2)
        over_space = self.spatial_norm(x).reshape(B * F, p, D)
        x = x + self.spatial_attention(over_space).reshape(x.shape)
        return x + self.mlp(self.mlp_norm(x))


class VisionEncoder(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: Rngs):
        self.config = config
        channels = (config.channels, *config.stem_widths)
        levels = len(config.stem_strides)
        self.stem = nnx.Dict(
            {
                f"level{i}": PatchEmbed(
                    channels[i], channels[i + 1], config.stem_strides[i], rngs=rngs
                )
                for i in range(levels)
            }
        )
        self.stem_norms = nnx.Dict(
            {f"level{i}": LayerNorm(channels[i + 1]) for i in range(levels - 1)}
        )

        def table(rows: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (rows, config.width), jnp.float32)
            return nnx.Param(0.02 * draw)

        self.position = table(config.grid**2)
        if config.temporal == "divided":
            self.frame_position = table(config.max_frames)
        self.layers = stack(
            lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs
        )
        self.final_norm = LayerNorm(config.width)

    def __call__(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """float[B, F, H, W, 3] normalised, bool[B, F] -> features in the dtype of `frames`."""
        config = self.config
        B, F = frames.shape[:2]
        if F > config.max_frames:
            raise ValueError(
                f"vision: clip of {F} frames, but vision.max_frames={config.max_frames}; "
                "give the bucket fewer frames or train a model with more"
            )
        stem, x = None, add_motion(frames) if config.motion else frames
        for i in range(len(config.stem_strides)):
            x = self.stem[f"level{i}"](x)
            if i + 1 < len(config.stem_strides):
                x = jax.nn.gelu(self.stem_norms[f"level{i}"](x), approximate=True)
            stem = x if stem is None else stem
        h, w, D = x.shape[2:]
        x = x.reshape(B, F, h * w, D) + self.position[...].astype(x.dtype)
        if config.temporal == "divided":
            x = x + self.frame_position[...][:F, None].astype(x.dtype)
        x, _ = run_layers(
            self.layers, lambda layer, x, _: (layer(x, frame_valid), None), x,
            remat=config.remat, unroll=config.unroll,
        )  # fmt: skip
        return VisionFeatures(stem, self.final_norm(x).reshape(B, F, h, w, D))
