"""Parts of the CG-DETR head: positions, projections, transformer layers, adaptive attention.

Layers are those of the release (cg_detr/{transformer,crossattention,position_encoding}.py of
wjun0830/CGDETR, which OpenGVLab/TPO has with casts and a prompt token only; read, not copied): a
position is added to queries and keys and not to values, norms stand behind the sums.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import LayerNorm, Linear, Rngs, matmul

MASKED = -1e9
_TEMPERATURE = 10000.0
_FEED_FORWARD = 4  # hidden units of a feed-forward net, in widths
_FIRST_SLOPE = 0.25  # of the learned rectifier, for negative inputs
_EPSILON = 1e-5  # of norms, PyTorch's


def norm(width: int) -> LayerNorm:
    return LayerNorm(width, epsilon=_EPSILON)


def sine_waves(positions: jax.Array, width: int) -> jax.Array:
    """float32[...] in [0, 1] -> float32[..., width], sines and cosines in turn (as in DETR)."""
    index = jnp.arange(width)
    angles = 2 * jnp.pi * positions[..., None] / _TEMPERATURE ** (2 * (index // 2) / width)
    return jnp.where(index % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def inverse_sigmoid(x: jax.Array, epsilon: float = 1e-3) -> jax.Array:
    """float[...] in [0, 1] -> float[...] logits; both chances are taken as at least `epsilon`."""
    return jnp.log(jnp.maximum(x, epsilon) / jnp.maximum(1 - x, epsilon))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of several heads.

    Args:
      q: float[n, T, C1]; k: float[n, K, C1]; v: float[n, K, C2].
      valid: bool[n, K]; a row without any valid key averages them all.

    Returns: float[n, T, C2] and the weights, averaged over heads, float[n, T, K].
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    logits = jnp.einsum("nthc,nkhc->nhtk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(valid[:, None, None], logits, MASKED), axis=-1)
    out = jnp.einsum("nhtk,nkhc->nthc", weights, v)
    return out.reshape(*out.shape[:2], -1), jnp.mean(weights, axis=1)


class InputProjection(nnx.Module):
    """Norm, linear, rectifier, norm, linear."""

    def __init__(self, features: int, width: int, *, rngs: Rngs):
        self.norm1, self.linear1 = norm(features), Linear(features, width, rngs=rngs)
        self.norm2, self.linear2 = norm(width), Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., features] -> float[..., width]."""
        return self.linear2(self.norm2(jax.nn.relu(self.linear1(self.norm1(x)))))


class ReluMlp(nnx.Module):
    """Linear layers with a rectifier between them; `last_scale` draws the last one smaller."""

    def __init__(self, widths: tuple[int, ...], *, rngs: Rngs, last_scale: float = 1.0):
        last = len(widths) - 2
        self.layers = nnx.Dict(
            {
                f"layer{i}": Linear(
                    widths[i], widths[i + 1], rngs=rngs, scale=last_scale if i == last else 1.0
                )
                for i in range(last + 1)
            }
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., widths[0]] -> float[..., widths[-1]]."""
        for i, layer in enumerate(self.layers.values()):
            x = layer(jax.nn.relu(x) if i else x)
        return x


class FeedForward(nnx.Module):
    """Linear, rectifier, linear; the rectifier's slope is learned.

    Parametric ReLU of He et al. 2015 (1502.01852).
    """

    def __init__(self, width: int, *, rngs: Rngs):
        self.fc1 = Linear(width, _FEED_FORWARD * width, rngs=rngs)
        self.fc2 = Linear(_FEED_FORWARD * width, width, rngs=rngs)
        self.slope = nnx.Param(jnp.full((), _FIRST_SLOPE, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., width] -> float[..., width]."""
        hidden = self.fc1(x)
        return self.fc2(jnp.where(hidden > 0, hidden, self.slope[...] * hidden))


class EncoderLayer(nnx.Module):
    """Self-attention with positions, then the feed-forward net; a norm behind each sum."""

    def __init__(self, width: int, heads: int, *, rngs: Rngs):
        # Queries, keys and values side by side, as published.
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.o_proj = Linear(width, width, rngs=rngs)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.feed_forward = FeedForward(width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, position: jax.Array, valid: jax.Array) -> jax.Array:
        """float[n, T, C], float[..., T, C], bool[n, T] of keys -> float[n, T, C]."""
        C = x.shape[-1]
        kernel, bias = (p.astype(x.dtype) for p in (self.qkv.merged_kernel, self.qkv.bias[...]))
        placed = matmul(x + position, kernel[:, : 2 * C]) + bias[: 2 * C]
        values = matmul(x, kernel[:, 2 * C :]) + bias[2 * C :]
        mixed, _ = attend(placed[..., :C], placed[..., C:], values, self.heads, valid)
        x = self.norm1(x + self.o_proj(mixed))
        return self.norm2(x + self.feed_forward(x))


class Encoder(nnx.Module):
    """A few encoder layers."""

    def __init__(self, width: int, heads: int, depth: int, *, rngs: Rngs):
        self.layers = nnx.Dict(
            {f"layer{i}": EncoderLayer(width, heads, rngs=rngs) for i in range(depth)}
        )

    def __call__(self, x: jax.Array, position: jax.Array, valid: jax.Array) -> jax.Array:
        """float[n, T, C], float[..., T, C], bool[n, T] of keys -> float[n, T, C]."""
        for layer in self.layers.values():
            x = layer(x, position, valid)
        return x


class AdaptiveLayer(nnx.Module):
    """Clips read the text through one softmax over dummies and words, of which only words speak.

    What a clip gives to the dummies is lost, so a clip that the text is not about gets little of
    it. Queries, keys and values are not projected. The feed-forward net reads the normalised sum,
    but is added to the sum itself.
    """

    def __init__(self, width: int, heads: int, *, rngs: Rngs):
        self.o_proj = Linear(width, width, rngs=rngs)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.feed_forward = FeedForward(width, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        clips: jax.Array,
        clip_position: jax.Array,
        keys: jax.Array,
        key_position: jax.Array,
        valid: jax.Array,
        is_word: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """One layer.

        Args:
          clips: float[n, F, C]; clip_position: float[..., F, C].
          keys: float[n, K, C]; key_position: float[K, C].
          valid: bool[n, K].
          is_word: bool[K].

        Returns: float[n, F, C], and attention float[n, F, K].
        """
        spoken = jnp.where(is_word[:, None], keys, 0.0)
        mixed, weights = attend(
            clips + clip_position, keys + key_position, spoken, self.heads, valid
        )
        return self.after(clips, mixed), weights

    def after(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """float[n, T, C], and what it read -> float[n, T, C]."""
        x = x + self.o_proj(mixed)
        return self.norm2(x + self.feed_forward(self.norm1(x)))
