"""Long rows: where the tokens of a prefix lie on the mesh axis `context`.

A prefix is cut into 2C chunks for C devices; device i holds chunks i and 2C - 1 - i. Under the
causal rule late chunks see more than early ones, and so every device has the same number of pairs
(Llama 3, 2407.21783, section 3.3.2, whose keys and values are gathered in every layer, too).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tpo_jax.parallel.mesh import BATCH_AXES

AXIS = "context"

Out = TypeVar("Out")  # an array, or a pytree of them


def context_devices() -> int:
    """C: size of the axis in the mesh around the call, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS]


def split_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Tells the compiler that `axis` of [B, ...] is split over `context`, and rows over (data,
    fsdp). An axis that does not divide stays whole. Nothing happens where C is 1."""
    devices = context_devices()
    if devices == 1 or x.shape[axis] % devices:
        return x
    spec = [BATCH_AXES, *(P.UNCONSTRAINED,) * (x.ndim - 1)]
    spec[axis] = AXIS
    return jax.lax.with_sharding_constraint(x, P(*spec))


def per_device(
    function: Callable[..., Out], args: Sequence, in_specs: Sequence[P], out_specs: Any
) -> Out:
    """function(*args) on each device's part of `context`; the compiler splits the other axes.

    Specs name `context` alone. What `function` closes over must not be traced.
    """
    return jax.shard_map(
        function, in_specs=tuple(in_specs), out_specs=out_specs, axis_names={AXIS},
        check_vma=False,
    )(*args)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ContextLayout:
    """Places of the P `tokens` of a prefix on C `devices`; with one device nothing moves.

    A placed prefix has `length` places, P' = 2C * `chunk` or P; those without a token hold zeros,
    which is the segment of padding.
    """

    tokens: int
    devices: int

    @classmethod
    def of(cls, tokens: int) -> ContextLayout:
        """The layout for the mesh around the call."""
        return cls(tokens, context_devices())

    @property
    def chunk(self) -> int:
        return -(-self.tokens // (2 * self.devices))

    @property
    def length(self) -> int:
        return self.tokens if self.devices == 1 else 2 * self.devices * self.chunk

    @property
    def order(self) -> np.ndarray:
        """int32[P'], the token at each place; numbers from P on are padding."""
        if self.devices == 1:
            return np.arange(self.tokens, dtype=np.int32)
        chunks = np.arange(2 * self.devices * self.chunk, dtype=np.int32)
        chunks = chunks.reshape(2 * self.devices, self.chunk)
        return np.stack([chunks[: self.devices], chunks[self.devices :][::-1]], axis=1).ravel()

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, P, ...] in order -> [B, P', ...] placed."""
        if self.devices == 1:
            return x
        padding = ((0, 0), (0, self.length - self.tokens)) + ((0, 0),) * (x.ndim - 2)
        chunks = jnp.pad(x, padding).reshape(x.shape[0], 2, self.devices, self.chunk, *x.shape[2:])
        pairs = jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2)
        return split_tokens(pairs.reshape(x.shape[0], self.length, *x.shape[2:]), axis=1)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `spread`: [B, P', ...] placed -> [B, P, ...] in order."""
        if self.devices == 1:
            return x
        return self._ordered(x)[:, : self.tokens]

    def gather(self, x: jax.Array) -> jax.Array:
        """Inside `per_device`: a device's part of [B, P', ...] -> all of [B, P', ...] in order,
        padding last."""
        return self._ordered(jax.lax.all_gather(x, AXIS, axis=1, tiled=True))

    def _ordered(self, x: jax.Array) -> jax.Array:
        pairs = x.reshape(x.shape[0], self.devices, 2, self.chunk, *x.shape[2:])
        return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)
