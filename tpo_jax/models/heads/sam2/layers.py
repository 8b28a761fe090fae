"""Layers that the parts of SAM 2 share. Pixels are channels-last; convolutions keep their kernels
as checkpoints store them, [out, in, height, width]."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.layers import Linear, Rngs, matmul
from tpo_jax.models.towers.interpolate import resize_grid

# torch.nn.LayerNorm's own; norms of pixels say 1e-6 instead.
EPSILON = 1e-5

# Projected queries and keys float[rows, T or S, N, H], turned by their places.
Rotate = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Conv(nnx.Module):
    """Convolution over float[..., h, w, C], if `depthwise` of every channel by itself."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int,
        *,
        rngs: Rngs,
        stride: int = 1,
        padding: int = 0,
        depthwise: bool = False,
    ):
        read = 1 if depthwise else features_in
        shape = (features_out, read, size, size)
        draw = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(draw * (read * size**2) ** -0.5)
        self.bias = nnx.Param(jnp.zeros(features_out, jnp.float32))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if kernel.shape[2:] == (1, 1):
            return matmul(x, kernel[:, :, 0, 0].T) + self.bias[...]
        rows = x.reshape(-1, *x.shape[-3:])
        options = {"stride": self.stride, "padding": self.padding}
        # On CPUs XLA's gradients of convolutions, which are loops, were most of a small step.
        y = jax.lax.platform_dependent(
            rows, kernel, cpu=functools.partial(convolved_by_products, **options),
            default=functools.partial(convolved, **options),
        )  # fmt: skip
        return y.reshape(*x.shape[:-3], *y.shape[1:]) + self.bias[...]


def convolved(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """float[B, h, w, C], float[O, C or 1, k, k] -> float[B, h', w', O]; one input channel a kernel
    makes it depthwise."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[1],
    )  # fmt: skip


def convolved_by_products(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int
) -> jax.Array:
    """`convolved`, as products with the pixels under each place of the kernel."""
    size, channels = kernel.shape[-1], x.shape[-1]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = ((n - size) // stride + 1 for n in x.shape[1:3])
    under = [
        x[:, a : a + stride * (h - 1) + 1 : stride, b : b + stride * (w - 1) + 1 : stride]
        for a in range(size)
        for b in range(size)
    ]
    places = kernel.reshape(*kernel.shape[:2], -1)
    if kernel.shape[1] == 1 and channels > 1:
        return sum(pixels * places[:, 0, i] for i, pixels in enumerate(under))
    flat = places.transpose(2, 1, 0).reshape(-1, kernel.shape[0])
    return matmul(jnp.concatenate(under, axis=-1), flat)


class DoublingConv(nnx.Module):
    """Transposed convolution of size and stride 2: every cell becomes 2 x 2 cells."""

    def __init__(self, features_in: int, features_out: int, *, rngs: Rngs):
        draw = jax.random.normal(rngs.params(), (features_in, features_out, 2, 2), jnp.float32)
        self.kernel = nnx.Param(draw * features_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(features_out, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., h, w, C] -> float[..., 2h, 2w, C']."""
        *lead, h, w, C = x.shape
        y = matmul(x, self.kernel[...].reshape(C, -1)).reshape(*lead, h, w, -1, 2, 2)
        y = jnp.moveaxis(y, -2, -4)  # [..., h, 2, w, C', 2]
        y = jnp.moveaxis(y, -1, -2)  # [..., h, 2, w, 2, C']
        return y.reshape(*lead, 2 * h, 2 * w, -1) + self.bias[...]


class FeedForward(nnx.Module):
    """Linear, ReLU, Linear, ReLU, Linear; named as in `transformers`."""

    def __init__(self, features_in: int, hidden: int, features_out: int, *, rngs: Rngs):
        self.proj_in = Linear(features_in, hidden, rngs=rngs)
        self.hidden = Linear(hidden, hidden, rngs=rngs)
        self.proj_out = Linear(hidden, features_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., features_in] -> float[..., features_out]."""
        return self.proj_out(jax.nn.relu(self.hidden(jax.nn.relu(self.proj_in(x)))))


class Attention(nnx.Module):
    """Attention from T tokens to S others, in `inner` features."""

    def __init__(
        self, width: int, inner: int, heads: int, *, rngs: Rngs, key_width: int | None = None
    ):
        self.q_proj = Linear(width, inner, rngs=rngs)
        self.k_proj = Linear(key_width or width, inner, rngs=rngs)
        self.v_proj = Linear(key_width or width, inner, rngs=rngs)
        self.o_proj = Linear(inner, width, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        visible: jax.Array | None = None,
        rotate: Rotate = lambda q, k: (q, k),
    ) -> jax.Array:
        """float[rows, T, C], float[rows, S, C'], the same -> float[rows, T, C].

        Args:
          visible: bool[rows, S], keys that may be seen; None: all.
          rotate: function of projected queries and keys float[rows, T or S, N, H].
        """
        q, k, v = (
            proj(x).reshape(*x.shape[:2], self.heads, -1)
            for proj, x in
            ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values))
        )  # fmt: skip
        q, k = rotate(q, k)
        segments = {}
        if visible is not None:
            seen = visible.astype(jnp.int32)
            segments = {"q_segments": jnp.ones(q.shape[:2], jnp.int32), "kv_segments": seen}
        out = attention(q, k, v, **segments)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


def table(rngs: Rngs, *shape: int) -> nnx.Param:
    """A learnt table, drawn from N(0, 0.02^2) as the release draws tables."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))


class FourierPositions(nnx.Module):
    """Random Fourier features of places (Tancik et al. 2020, 2006.10739). The frequencies are
    drawn once, from `key`, and never trained, but belong to a checkpoint."""

    def __init__(self, width: int, key: jax.Array):
        self.frequencies = nnx.Param(jax.random.normal(key, (2, width // 2), jnp.float32))

    def __call__(self, places: jax.Array) -> jax.Array:
        """float32[..., 2], x and y in [0, 1] -> float32[..., C]."""
        frequencies = jax.lax.stop_gradient(self.frequencies[...])
        angles = 2.0 * jnp.pi * ((2.0 * places - 1.0) @ frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sine_positions(grid: int, width: int) -> np.ndarray:
    """float32[grid, grid, width]: the first half says where in y, the second where in x.

    Sines and cosines alternate over wave lengths of 2 pi to 20,000 pi, as in DETR (Carion et al.
    2020, 2005.12872); places run from 2 pi / grid to 2 pi.
    """
    half = width // 2
    places = np.arange(1, grid + 1, dtype=np.float32) / np.float32(grid + 1e-6) * (2 * np.pi)
    waves = 10000.0 ** (2 * (np.arange(half) // 2) / half)
    angles = places[:, None] / waves
    code = np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles))
    rows = np.broadcast_to(code[:, None], (grid, grid, half))
    columns = np.broadcast_to(code[None], (grid, grid, half))
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def time_waves(times: jax.Array, width: int) -> jax.Array:
    """float32[...] -> float32[..., width]: all sines, then all cosines."""
    half = width // 2
    angles = times[..., None] / 10000.0 ** (2 * (np.arange(half) // 2) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(jnp.float32)


def resize_masks(masks: jax.Array, size: int, *, antialias: bool = False) -> jax.Array:
    """Bilinear float[..., h, w] -> float[..., size, size]."""
    if masks.shape[-2:] == (size, size):
        return masks
    return resize_grid(masks[..., None], (size, size), antialias=antialias)[..., 0]
