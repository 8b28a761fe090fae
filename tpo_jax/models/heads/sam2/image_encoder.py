"""Image encoder of SAM 2: Hiera (Ryali et al. 2023, 2306.00989) with windows of its own at every
stage and a pyramid neck (Lin et al. 2017, 1612.03144)."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.heads.sam2.layers import Conv, table
from tpo_jax.models.layers import LayerNorm, Linear, Rngs, run_layers, stack
from tpo_jax.models.sam2_config import STAGES, Sam2Config
from tpo_jax.models.towers.interpolate import resize_grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """float32[..., h, w, C] each: `fine` at 1/4 and `middle` at 1/8 of the image with C/8 and C/4
    channels, as the mask decoder adds them; `top` at 1/16 with C."""

    fine: jax.Array
    middle: jax.Array
    top: jax.Array


class Block(nnx.Module):
    """Window attention and an MLP, both residual; with `widen` the first of a stage, which pools
    its queries 2 x 2."""

    def __init__(self, width_in: int, width: int, heads: int, *, widen: bool, rngs: Rngs):
        self.layer_norm1 = LayerNorm(width_in)
        self.qkv = Linear(width_in, 3 * width, rngs=rngs)
        self.o_proj = Linear(width, width, rngs=rngs)
        self.layer_norm2 = LayerNorm(width)
        self.fc1 = Linear(width, 4 * width, rngs=rngs)
        self.fc2 = Linear(4 * width, width, rngs=rngs)
        self.proj = Linear(width_in, width, rngs=rngs) if widen else None
        self.heads = heads

    def __call__(self, x: jax.Array, window: int) -> jax.Array:
        """float[B, h, w, C] -> float[B, h, w, C'], halved sides if it widens; window 0: no windows.

        Windows that stick out over the edge are filled with zeros, which take part.
        """
        normal = self.layer_norm1(x)
        residual = x if self.proj is None else pooled(self.proj(normal))
        windows = normal if window == 0 else to_windows(normal, window)
        attended = self.attend(windows)
        if window:
            side = window if self.proj is None else window // 2
            attended = from_windows(attended, side, residual.shape)
        x = residual + attended
        hidden = jax.nn.gelu(self.fc1(self.layer_norm2(x)), approximate=False)
        return x + self.fc2(hidden)

    def attend(self, x: jax.Array) -> jax.Array:
        """float[rows, h, w, C] -> float[rows, h', w', C'], every cell with all of its row."""
        rows, h, w, _ = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q = q if self.proj is None else pooled(q)
        out_shape = q.shape
        q, k, v = (y.reshape(rows, -1, self.heads, q.shape[-1] // self.heads) for y in (q, k, v))
        return self.o_proj(attention(q, k, v).reshape(out_shape))


def pooled(x: jax.Array) -> jax.Array:
    """Maximum over 2 x 2 cells of float[rows, h, w, C]."""
    rows, h, w, C = x.shape
    return jnp.max(x.reshape(rows, h // 2, 2, w // 2, 2, C), axis=(2, 4))


def to_windows(x: jax.Array, side: int) -> jax.Array:
    """float[B, h, w, C] -> float[B * windows, side, side, C]; zeros fill the far edges."""
    B, h, w, C = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
    x = x.reshape(B, x.shape[1] // side, side, x.shape[2] // side, side, C)
    return jnp.swapaxes(x, 2, 3).reshape(-1, side, side, C)


def from_windows(x: jax.Array, side: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_windows`, for `shape` [B, h, w, C]."""
    B, h, w, C = shape
    x = x.reshape(B, -(-h // side), -(-w // side), side, side, C)
    x = jnp.swapaxes(x, 2, 3).reshape(B, x.shape[1] * side, x.shape[2] * side, C)
    return x[:, :h, :w]


class Stage(nnx.Module):
    """Blocks of one width. `first` is there in every stage but the first; the others are one
    stack, run in pieces of one window."""

    def __init__(self, config: Sam2Config, index: int, *, rngs: Rngs):
        width, heads, depth = config.widths[index], config.heads[index], config.depths[index]
        start, widens = sum(config.depths[:index]), index > 0

        def window(number: int, side: int) -> int:
            return 0 if number in config.global_blocks else side

        def block(width_in: int, rngs: Rngs) -> Block:
            return Block(width_in, width, heads, widen=width_in != width, rngs=rngs)

        before = max(index - 1, 0)
        self.first_window = window(start, config.windows[before])
        self.first = block(config.widths[before], rngs) if widens else None
        rest = range(start + widens, start + depth)
        self.windows = tuple(window(number, config.windows[index]) for number in rest)
        several = functools.partial(stack, functools.partial(block, width), len(rest))
        self.blocks = several(rngs) if rest else None
        self.remat = config.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, h, w, C] -> float[B, h', w', C']."""
        if self.first is not None:
            x = self.first(x, self.first_window)
        if self.blocks is None:
            return x
        structure, parameters = nnx.split(self.blocks)
        at = 0
        for window, same in itertools.groupby(self.windows):
            end = at + len(list(same))
            run = jax.tree.map(lambda leaf, at=at, end=end: leaf[at:end], parameters)

            def apply(
                block: Block, x: jax.Array, _: object, window: int = window
            ) -> tuple[jax.Array, None]:
                return block(x, window), None

            x, _ = run_layers(nnx.merge(structure, run), apply, x, remat=self.remat)
            at = end
        return x


class Hiera(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width, side = config.widths[0], config.windows[0]
        self.patch_embedding = Conv(3, width, 7, stride=4, padding=3, rngs=rngs)
        # The release draws it from N(0, 0.02^2), too small to be seen beside the pixels: from such
        # weights a small model does not learn in hundreds of steps where its prompt is.
        draw = jax.random.normal(rngs.params(), (1, width, *[config.position_grid] * 2))
        self.position = nnx.Param(draw)
        self.window_position = table(rngs, 1, width, side, side)
        self.stages = nnx.Dict({f"stage{i}": Stage(config, i, rngs=rngs) for i in range(STAGES)})

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """float[B, H, W, 3] -> what leaves each stage, float[B, H/4, W/4, C] and on."""
        x = self.patch_embedding(images)
        side = self.window_position.shape[-1]
        position = resize_grid(self.position[...].transpose(0, 2, 3, 1), x.shape[1:3], "cubic")
        repeats = (1, x.shape[1] // side, x.shape[2] // side, 1)
        x = x + position + jnp.tile(self.window_position[...].transpose(0, 2, 3, 1), repeats)
        outputs = []
        for stage in self.stages.values():
            x = stage(x)
            outputs.append(x)
        return outputs


class ImageEncoder(nnx.Module):
    """Hiera and its neck: the third level has the fourth added, the first two stand alone."""

    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        self.backbone = Hiera(config, rngs=rngs)
        self.neck = nnx.Dict(
            {f"stage{i}": Conv(config.widths[i], config.width, 1, rngs=rngs) for i in range(STAGES)}
        )

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """float[B, H, W, 3], normalised -> levels at 1/4, 1/8 and 1/16, float[B, h, w, C]."""
        states = self.backbone(images)
        *levels, last = (
            conv(state) for conv, state in zip(self.neck.values(), states, strict=True)
        )
        levels[-1] += jnp.repeat(jnp.repeat(last, 2, axis=1), 2, axis=2)
        return levels
