"""What the towers share: patches, the pre-norm layer, and running a stack up to one hidden state.

Parameter names follow Hugging Face's, so that the rows of a weight mapping are short.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import (
    LayerNorm,
    Linear,
    Rngs,
    exact_gelu,
    gelu,
    recomputed,
    run_layers,
)
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.vision import SelfAttention, VisionFeatures, to_patches

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_pytorch_tanh": gelu,
    "quick_gelu": recomputed(lambda x: x * jax.nn.sigmoid(1.702 * x)),
}


class PatchEmbedding(nnx.Module):
    """A strided convolution as one matrix product; `kernel` is stored as checkpoints store it,
    [out, 3, p, p]. Pixels that fill no whole patch are cut off."""

    def __init__(self, config: TowerConfig, *, bias: bool, rngs: Rngs):
        self.patch_size, p = config.patch_size, config.patch_size
        draw = jax.random.normal(rngs.params(), (config.width, 3, p, p), jnp.float32)
        self.kernel = nnx.Param(draw * (3 * p * p) ** -0.5)
        self.bias = nnx.Param(jnp.zeros(config.width, jnp.float32)) if bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """float[..., H, W, 3] -> float[..., H // p, W // p, D]."""
        p = self.patch_size
        patches = to_patches(whole_patches(images, p), p)
        kernel = self.kernel[...].transpose(2, 3, 1, 0).reshape(p * p * 3, -1)
        x = patches @ kernel.astype(patches.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


def whole_patches(images: jax.Array, patch_size: int) -> jax.Array:
    """The part of float[..., H, W, C] that whole patches cover."""
    h, w = (size // patch_size * patch_size for size in images.shape[-3:-1])
    return images[..., :h, :w, :]


class TowerMlp(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.fc1 = Linear(config.width, config.mlp_width, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., D] -> float[..., D]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm attention over the tokens of each frame, then an MLP; both residual."""

    def __init__(self, config: TowerConfig, *, rngs: Rngs):
        self.layer_norm1 = LayerNorm(config.width, epsilon=config.epsilon)
        self.self_attn = SelfAttention(config.width, config.heads, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.width, epsilon=config.epsilon)
        self.mlp = TowerMlp(config, rngs=rngs)

    def __call__(self, x: jax.Array, frame_valid: jax.Array) -> jax.Array:
        """float[B, F, n, D], bool[B, F] -> float[B, F, n, D]."""
        B, F, n, D = x.shape
        rows = self.layer_norm1(x).reshape(B * F, n, D)
        x = x + self.self_attn(rows).reshape(x.shape)
        return x + self.mlp(self.layer_norm2(x))


def run_stack(
    layers: nnx.Module, config: TowerConfig, x: jax.Array, frame_valid: jax.Array, *, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The hidden state that `config.layer` names and, with `keep`, all from 0 to depth.

    Args:
      layers: stack of `config.depth` layers.
      x: float[B, ..., D], what enters the first layer.

    Returns: (x, float[depth + 1, B, ..., D] or None).
    """
    count = config.depth if keep else config.layers_run
    if count < config.depth:
        structure, parameters = nnx.split(layers)
        layers = nnx.merge(structure, jax.tree.map(lambda leaf: leaf[:count], parameters))

    def apply(layer: nnx.Module, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
        x = layer(x, frame_valid)
        return x, (x if keep else None)

    if count == 0:
        return x, None
    last, outputs = run_layers(layers, apply, x, remat=config.remat, unroll=config.unroll)
    if not keep:
        return last, None
    states = jnp.concatenate([x[None], outputs])
    return states[config.layers_run], states


def features(
    stem: jax.Array, x: jax.Array, class_token: jax.Array | None = None
) -> VisionFeatures:
    """stem float[B, F, h, w, D] and patch tokens float[B, F, h * w, D] as VisionFeatures."""
    return VisionFeatures(stem, x.reshape(stem.shape), class_token)
