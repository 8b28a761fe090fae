"""Weights by path, and the layers that an exported model is made of, in PyTorch.

Read by tpo_torch.py beside it. Kernels are [in, out]; a stacked leaf has one entry a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TIME_WAVES = 16
POSITION_OCTAVES = 6
Tensors = dict[str, Tensor]


class Weights:
    """Tensors by path below one prefix; `layer` picks an entry of stacked leaves."""

    def __init__(self, tensors: Tensors, prefix: str = "", layer: int | None = None):
        self.tensors, self.prefix, self.layer = tensors, prefix, layer

    def at(self, name: str, layer: int | None = None) -> Weights:
        layer = self.layer if layer is None else layer
        return Weights(self.tensors, f"{self.prefix}{name}/", layer)

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[f"{self.prefix}{name}"]
        return tensor if self.layer is None else tensor[self.layer]

    def children(self, name: str) -> int:
        """How many of <name>0, <name>1, ... there are."""
        count = 0
        while any(key.startswith(f"{self.prefix}{name}{count}/") for key in self.tensors):
            count += 1
        return count


def linear(w: Weights, x: Tensor) -> Tensor:
    y = x @ w["kernel"]
    return y + w["bias"] if w.has("bias") else y


def time_waves(times: Tensor, periods: Sequence[float]) -> Tensor:
    """[B, F] seconds -> [B, F, 2 * TIME_WAVES]: sines, then cosines."""
    periods = torch.tensor(np.geomspace(*periods, TIME_WAVES), dtype=torch.float32)
    angles = 2 * math.pi * times[..., None] / periods
    return torch.cat([torch.sin(angles), torch.cos(angles)], -1)


def cell_centres(rows: int, columns: int) -> Tensor:
    """[rows * columns, 2], x and y in [0, 1]."""
    y, x = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    return torch.stack([x, y], -1).flatten(0, 1)


def cells_inside(box: Tensor, grid: int) -> Tensor:
    """Equal shares [grid * grid] of the cells with their centre in the box, else the nearest."""
    places = cell_centres(grid, grid)
    inside = ((box[:2] <= places) & (places <= box[2:])).all(-1).float()
    if not inside.any():
        inside[((places - (box[:2] + box[2:]) / 2) ** 2).sum(-1).argmin()] = 1.0
    return inside / inside.sum()


def position_waves(positions: Tensor) -> Tensor:
    """[..., n] -> [..., n * 2 * POSITION_OCTAVES]."""
    angles = positions[..., None] * math.pi * 2.0 ** torch.arange(POSITION_OCTAVES)
    return torch.cat([torch.sin(angles), torch.cos(angles)], -1).flatten(-2)


def layer_norm(w: Weights, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["scale"], w["bias"], eps=eps)


norm = functools.partial(layer_norm, eps=1e-5)  # those of the CG-DETR head


def mlp(w: Weights, x: Tensor) -> Tensor:
    return linear(w.at("fc2"), F.gelu(linear(w.at("fc1"), x), approximate="tanh"))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[rows, T, C], [rows, S, C] -> [rows, T, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def self_attention(w: Weights, x: Tensor, heads: int) -> Tensor:
    q, k, v = (linear(w.at(name), x) for name in ("q_proj", "k_proj", "v_proj"))
    return linear(w.at("o_proj"), attend(q, k, v, heads))


def slot_attention(w: Weights, queries: Tensor, tokens: Tensor, heads: int) -> Tensor:
    q = linear(w.at("q_proj"), layer_norm(w.at("query_norm"), queries))
    k, v = linear(w.at("k_proj"), tokens), linear(w.at("v_proj"), tokens)
    x = queries + linear(w.at("o_proj"), attend(q, k, v, heads))
    return x + mlp(w.at("mlp"), layer_norm(w.at("mlp_norm"), x))


def frame_mixer(w: Weights, x: Tensor, heads: int) -> Tensor:
    """[B, S, F, C]: each slot over its frames."""
    rows = layer_norm(w.at("attention_norm"), x).flatten(0, 1)
    x = x + self_attention(w.at("attention"), rows, heads).view_as(x)
    return x + mlp(w.at("mlp"), layer_norm(w.at("mlp_norm"), x))


def attend_weighted(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`attend`, and its weights averaged over heads, [rows, T, S]; v may be of another width."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ v).transpose(1, 2).flatten(2), weights.mean(1)


def sine_waves(positions: Tensor, width: int) -> Tensor:
    """[...] -> [..., width]: sines and cosines in turn."""
    index = torch.arange(width)
    angles = 2 * math.pi * positions[..., None] / 10000.0 ** (2 * (index // 2) / width)
    return torch.where(index % 2 == 0, torch.sin(angles), torch.cos(angles))


def inverse_sigmoid(x: Tensor) -> Tensor:
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def input_projection(w: Weights, x: Tensor) -> Tensor:
    x = F.relu(linear(w.at("linear1"), norm(w.at("norm1"), x)))
    return linear(w.at("linear2"), norm(w.at("norm2"), x))


def relu_mlp(w: Weights, x: Tensor) -> Tensor:
    layers = w.at("layers")
    for i in range(layers.children("layer")):
        x = linear(layers.at(f"layer{i}"), F.relu(x) if i else x)
    return x


def feed_forward(w: Weights, x: Tensor) -> Tensor:
    hidden = linear(w.at("fc1"), x)
    return linear(w.at("fc2"), torch.where(hidden > 0, hidden, w["slope"] * hidden))


def after_reading(w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + linear(w.at("o_proj"), mixed)
    return norm(w.at("norm2"), x + feed_forward(w.at("feed_forward"), norm(w.at("norm1"), x)))


def encoder(w: Weights, x: Tensor, position: Tensor, heads: int) -> Tensor:
    """Post-norm layers; positions are added to queries and keys."""
    layers = w.at("layers")
    for i in range(layers.children("layer")):
        layer = layers.at(f"layer{i}")
        q, k, _ = linear(layer.at("qkv"), x + position).chunk(3, -1)
        mixed = attend(q, k, linear(layer.at("qkv"), x).chunk(3, -1)[2], heads)
        x = norm(layer.at("norm1"), x + linear(layer.at("o_proj"), mixed))
        x = norm(layer.at("norm2"), x + feed_forward(layer.at("feed_forward"), x))
    return x


def add_motion(frames: Tensor) -> Tensor:
    """[B, F, H, W, 3] -> [B, F, H, W, 6]: each frame and its change since the one before."""
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    return torch.cat([frames, frames - before], dim=-1)


def to_patches(x: Tensor, stride: int) -> Tensor:
    """[..., H, W, C] -> [..., H / stride, W / stride, stride * stride * C]."""
    *lead, H, W, C = x.shape
    x = x.reshape(*lead, H // stride, stride, W // stride, stride, C).transpose(-4, -3)
    return x.reshape(*lead, H // stride, W // stride, stride * stride * C)


def bilinear_weights(size_in: int, size_out: int) -> Tensor:
    """[size_out, size_in]."""
    position = (torch.arange(size_out) + 0.5) * size_in / size_out - 0.5
    position = position.clamp(0, size_in - 1)
    return (1 - (position[:, None] - torch.arange(size_in)).abs()).clamp(min=0)
