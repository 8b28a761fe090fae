"""Rotary positions: frequencies of the published ways to stretch them, tables and rotation.

Frequencies are computed in float32 in the order of operations of `transformers`
(modeling_rope_utils.py), so that long positions turn by the same angle here and there.

    linear   Chen et al. 2023 (2306.15595): positions divided by `factor`
    dynamic  NTK-aware: the base grows with the longest position of a row beyond `original_length`
    yarn     Peng et al. 2023 (2309.00071): slow waves stretched, fast ones kept, scores sharpened
    llama3   Llama 3.1: the same idea with other bounds
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from tpo_jax.errors import UserError

KINDS = ("linear", "dynamic", "yarn", "llama3")

Tables = tuple[jax.Array, jax.Array]  # cos, sin float32[..., T, 1, H/2]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched beyond the length that a model was first trained on.

    Attributes:
      kind: one of KINDS.
      factor: how many times longer.
      original_length: positions before stretching; not used by "linear".
      low_frequency, high_frequency: "llama3", bounds in waves per original length.
      beta_fast, beta_slow: "yarn", bounds in turns per original length.
      attention_factor: "yarn", multiplies queries and keys; None is 0.1 ln(factor) + 1.
      truncate: "yarn", whether the bounds are rounded to whole dimensions.
    """

    kind: str
    factor: float
    original_length: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        at = "model config: language.rope_scaling."
        if self.kind not in KINDS:
            raise UserError(f"{at}kind={self.kind!r}: unknown; use one of {KINDS}")
        if not self.factor >= 1.0:
            raise UserError(f"{at}factor={self.factor!r}: must be 1 or more")
        if self.kind != "linear" and not (self.original_length or 0) > 0:
            raise UserError(
                f"{at}original_length={self.original_length!r}: {self.kind!r} needs the number of "
                "positions before stretching"
            )
        if self.kind == "llama3" and not 0 < self.low_frequency < self.high_frequency:
            raise UserError(
                f"{at}low_frequency={self.low_frequency!r}: must be in 0..high_frequency="
                f"{self.high_frequency!r}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RopeScaling:
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(data.keys() - names):
            raise UserError(
                f"model config: language.rope_scaling.{unknown[0]}: unknown key; known: "
                f"{sorted(names)}"
            )
        return cls(**data)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Tables:
    """int32[..., T] -> cos, sin float32[..., T, 1, H/2] (an axis for the heads)."""
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if scaling is None:
        frequencies, sharpen = _inverse(theta, powers), 1.0
    elif scaling.kind == "dynamic":
        frequencies, sharpen = _dynamic(positions, head_dim, theta, powers, scaling), 1.0
    else:
        stretch = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.kind]
        frequencies, sharpen = stretch(head_dim, theta, powers, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies

    def tables(angles: jax.Array) -> Tables:
        return jnp.cos(angles) * sharpen, jnp.sin(angles) * sharpen

    def called(angles: jax.Array) -> Tables:
        # XLA:CPU counts sines as cheap: where layers are unrolled it would take them anew in each
        # rotation, for every head.
        with set_xla_metadata(inlineable="false"):
            return jax.jit(tables)(angles)

    return jax.lax.platform_dependent(angles, cpu=called, default=tables)


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """Rotary positions in the half-rotation layout: pairs are (i, i + H/2). float[..., N, H]."""
    cos, sin = tables
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)


def _inverse(theta: float, powers: np.ndarray) -> np.ndarray:
    """float32[H/2] angle per position of each pair."""
    return np.float32(1.0) / np.float32(theta) ** powers


def _linear(
    head_dim: int, theta: float, powers: np.ndarray, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    return _inverse(theta, powers) / np.float32(scaling.factor), 1.0


def _dynamic(
    positions: jax.Array, head_dim: int, theta: float, powers: np.ndarray, scaling: RopeScaling
) -> jax.Array:
    """float32[..., 1, 1, H/2], one set of frequencies a row.

    Published code takes the longest row of the batch; here a row does not depend on its batch.
    """
    length = jnp.max(positions, axis=-1, keepdims=True)[..., None, None] + 1
    length = jnp.maximum(length, scaling.original_length).astype(jnp.float32)
    growth = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    base = theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / base**powers


def _llama3(
    head_dim: int, theta: float, powers: np.ndarray, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    frequencies = _inverse(theta, powers)
    waves = scaling.original_length * frequencies / np.float32(2 * math.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    # 0: stretched, 1: kept; the original rounds each of the three cases by itself.
    share = np.clip((waves - low) / (high - low), 0, 1).astype(np.float32)
    slow = frequencies / np.float32(scaling.factor)
    return (1 - share) * slow + share * frequencies, 1.0


def _yarn(
    head_dim: int, theta: float, powers: np.ndarray, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    def dimension(turns: float) -> float:
        """The pair that makes so many turns within the original length."""
        length = scaling.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    ramp = ramp.astype(np.float32)
    frequencies = _inverse(theta, powers)
    sharpen = scaling.attention_factor
    if sharpen is None:
        sharpen = 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
    return frequencies / np.float32(scaling.factor) * ramp + frequencies * (1 - ramp), sharpen
