"""Memory of SAM 2: frames read earlier frames by attention with rotary positions in the plane, and
what was found in a frame becomes a memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.heads.sam2.layers import EPSILON, Attention, Conv, sine_positions
from tpo_jax.models.layers import LayerNorm, Linear, Rngs, run_layers, stack
from tpo_jax.models.sam2_config import Sam2Config

_THETA = 10000.0
# Mask probabilities enter a memory as logits of this range.
_MASK_SCALE, _MASK_SHIFT = 20.0, -10.0
# Halvings from the image to the feature grid.
_HALVINGS = 4


def rotations(grid: int, width: int) -> np.ndarray:
    """complex64[grid * grid, width / 2]: the turn of each pair of features at each cell; the first
    half turns with x, the second with y (axial RoPE, Heo et al. 2024, 2403.13298)."""
    rates = _THETA ** (-np.arange(0, width // 2, 2) / (width // 2))
    y, x = np.divmod(np.arange(grid * grid), grid)
    angles = np.concatenate([x[:, None] * rates, y[:, None] * rates], axis=-1)
    return np.exp(1j * angles).astype(np.complex64)


def rotate(x: jax.Array, turns: np.ndarray) -> jax.Array:
    """Turns pairs of neighbouring features of float[rows, T, N, H] by complex[T, H / 2]."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = jnp.asarray(turns.real)[:, None], jnp.asarray(turns.imag)[:, None]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


class MemoryAttentionLayer(nnx.Module):
    """Pre-norm: cells among themselves, cells to memories, an MLP."""

    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width = config.width
        self.layer_norm1 = LayerNorm(width, epsilon=EPSILON)
        self.self_attn = Attention(width, width, 1, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=EPSILON)
        self.cross_attn = Attention(width, width, 1, key_width=config.memory_width, rngs=rngs)
        self.layer_norm3 = LayerNorm(width, epsilon=EPSILON)
        self.linear1 = Linear(width, config.memory_mlp_width, rngs=rngs)
        self.linear2 = Linear(config.memory_mlp_width, width, rngs=rngs)

    def __call__(
        self,
        cells: jax.Array,
        memory: jax.Array,
        position: jax.Array,
        visible: jax.Array,
        turns: np.ndarray,
        memories: int,
    ) -> jax.Array:
        """Arguments and result as of `MemoryAttention`; `turns` of `rotations`."""

        def rotate_cells(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
            return rotate(q, turns), rotate(k, turns)

        def rotate_memories(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
            placed = memories * turns.shape[0]
            turned = rotate(k[:, :placed], np.tile(turns, (memories, 1)))
            return rotate(q, turns), jnp.concatenate([turned, k[:, placed:]], axis=1)

        x = self.layer_norm1(cells)
        cells = cells + self.self_attn(x, x, x, rotate=rotate_cells)
        x = self.layer_norm2(cells)
        cells = cells + self.cross_attn(
            x, memory + position, memory, visible, rotate=rotate_memories
        )
        x = self.layer_norm3(cells)
        return cells + self.linear2(jax.nn.relu(self.linear1(x)))


class MemoryAttention(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        self.layers = stack(functools.partial(_layer, config), config.memory_layers, rngs)
        self.final_norm = LayerNorm(config.width, epsilon=EPSILON)
        self.grid, self.width, self.remat = config.grid, config.width, config.remat

    def __call__(
        self,
        cells: jax.Array,
        memory: jax.Array,
        position: jax.Array,
        visible: jax.Array,
        memories: int,
    ) -> jax.Array:
        """
        Args:
          cells: float32[rows, hw, C], of the frame.
          memory: float32[rows, M, Cm]: `memories` grids of hw cells each, then pointers, which
            have no place and are not turned.
          position: float32[rows, M, Cm], added to keys.
          visible: bool[rows, M].

        Returns: float32[rows, hw, C].
        """
        here = sine_positions(self.grid, self.width).reshape(-1, self.width)
        turns = rotations(self.grid, self.width)

        def apply(
            layer: MemoryAttentionLayer, cells: jax.Array, _: object
        ) -> tuple[jax.Array, None]:
            return layer(cells, memory, position, visible, turns, memories), None

        cells, _ = run_layers(self.layers, apply, cells + 0.1 * here, remat=self.remat)
        return self.final_norm(cells)


def _layer(config: Sam2Config, rngs: Rngs) -> MemoryAttentionLayer:
    return MemoryAttentionLayer(config, rngs=rngs)


class MaskDownsampler(nnx.Module):
    """Convolutions of stride 2 and size 3, each with four times the channels of the one before."""

    def __init__(self, width: int, *, rngs: Rngs):
        self.convs, self.norms = nnx.Dict(), nnx.Dict()
        for i in range(_HALVINGS):
            self.convs[f"layer{i}"] = Conv(4**i, 4 ** (i + 1), 3, stride=2, padding=1, rngs=rngs)
            self.norms[f"layer{i}"] = LayerNorm(4 ** (i + 1))
        self.final_conv = Conv(4**_HALVINGS, width, 1, rngs=rngs)

    def __call__(self, masks: jax.Array) -> jax.Array:
        """float[..., H, W] -> float[..., H/16, W/16, C]."""
        x = masks[..., None]
        for conv, norm in zip(self.convs.values(), self.norms.values(), strict=True):
            x = jax.nn.gelu(norm(conv(x)), approximate=False)
        return self.final_conv(x)


class FuserLayer(nnx.Module):
    """A ConvNeXt block (Liu et al. 2022, 2201.03545)."""

    def __init__(self, width: int, hidden: int, *, rngs: Rngs):
        self.depthwise_conv = Conv(width, width, 7, padding=3, depthwise=True, rngs=rngs)
        self.layer_norm = LayerNorm(width)
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., h, w, C] -> float[..., h, w, C]."""
        hidden = self.fc1(self.layer_norm(self.depthwise_conv(x)))
        return x + self.scale[...] * self.fc2(jax.nn.gelu(hidden, approximate=False))


class MemoryEncoder(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width = config.width
        self.mask_downsampler = MaskDownsampler(width, rngs=rngs)
        self.feature_projection = Conv(width, width, 1, rngs=rngs)
        self.fuser = stack(
            lambda rngs: FuserLayer(width, config.fuser_mlp_width, rngs=rngs),
            config.fuser_layers, rngs,
        )  # fmt: skip
        self.projection = Conv(width, config.memory_width, 1, rngs=rngs)

    def __call__(self, top: jax.Array, masks: jax.Array) -> jax.Array:
        """
        Args:
          top: float32[rows, h, w, C], cells of the frame as no memory has touched them.
          masks: float32[rows, 16h, 16w], chances in [0, 1].

        Returns: float32[rows, h, w, Cm].
        """
        x = self.feature_projection(top)
        x = x + self.mask_downsampler(masks * _MASK_SCALE + _MASK_SHIFT)
        x, _ = run_layers(self.fuser, lambda layer, x, _: (layer(x), None), x)
        return self.projection(x)
