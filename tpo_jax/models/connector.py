"""From patch features to visual tokens in the language model's space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.config import ConnectorConfig
from tpo_jax.models.layers import Mlp, Rngs


class Connector(nnx.Module):
    """Pools each frame to grid x grid by averaging, then an MLP.

    The output starts with the scale of token embeddings (variance 1 / width), so that visual and
    text tokens enter the decoder alike.
    """

    def __init__(self, config: ConnectorConfig, width: int, language_width: int, *, rngs: Rngs):
        self.config = config
        self.mlp = Mlp(
            width, config.hidden, language_width, rngs=rngs, scale=language_width**-0.5
        )

    def __call__(self, patches: jax.Array) -> jax.Array:
        """float[B, F, h, w, D_vision] -> float[B, F * grid * grid, D], by frame, row, column."""
        B, F, h, w, D = patches.shape
        grid = self.config.grid
        x = patches.reshape(B, F, grid, h // grid, grid, w // grid, D)
        x = jnp.mean(x, axis=(3, 5), dtype=jnp.float32).astype(patches.dtype)
        return self.mlp(x.reshape(B, F * grid * grid, D))
