"""The one way in which a loss is averaged: sums and weights first, one division last.

Adding sums and weights over micro-batches, packed rows or devices and dividing once gives a result
that does not depend on how the examples were grouped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """total = sum of weight * value, weight = sum of weight; float32[], or batched alike."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> WeightedSum:
        """Sums `values * weights` over every axis; `values` float[...], `weights` broadcastable.

        Entries of weight zero may hold anything, NaN included: they reach neither the total nor,
        through it, the gradient.
        """
        weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
        kept = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
        return cls(jnp.sum(kept * weights), jnp.sum(weights))

    @classmethod
    def zero(cls) -> WeightedSum:
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def mean(self) -> jax.Array:
        """float32[]: total / weight; 0 (with a zero, finite gradient) where the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))
