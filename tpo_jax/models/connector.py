"""From patch features to visual tokens in the language model's space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.config import ConnectorConfig
from tpo_jax.models.layers import Linear, Mlp, Rngs

TIME_WAVES = 16


class Connector(nnx.Module):
    """Pools each frame to grid x grid by averaging, then an MLP; adds the frame's time.

    The output starts with the scale of token embeddings (variance 1 / width), so that visual and
    text tokens enter the decoder alike.
    """

    def __init__(self, config: ConnectorConfig, width: int, language_width: int, *, rngs: Rngs):
        self.config = config
        self.mlp = Mlp(width, config.hidden, language_width, rngs=rngs, scale=language_width**-0.5)
        if config.time_periods is not None:
            self.time = Linear(
                2 * TIME_WAVES,
                language_width,
                rngs=rngs,
                bias=False,
                scale=language_width**-0.5,
            )

    def __call__(self, patches: jax.Array, times: jax.Array) -> jax.Array:
        """Visual tokens, by frame, row, column.

        Args:
          patches: float[B, F, h, w, D_vision].
          times: float32[B, F], seconds.

        Returns:
          float[B, F * grid * grid, D].
        """
        B, F, h, w, D = patches.shape
        grid = self.config.grid
        x = patches.reshape(B, F, grid, h // grid, grid, w // grid, D)
        x = jnp.mean(x, axis=(3, 5), dtype=jnp.float32).astype(patches.dtype)
        tokens = self.mlp(x.reshape(B, F * grid * grid, D))
        if self.config.time_periods is None:
            return tokens
        time = self.time(time_waves(times, self.config.time_periods).astype(patches.dtype))
        return tokens + jnp.repeat(time, grid * grid, axis=1)


def time_waves(times: jax.Array, periods: tuple[float, float]) -> jax.Array:
    """float32[B, F] seconds -> float32[B, F, 2 * TIME_WAVES]: sines, then cosines.

    The sinusoidal encoding of Vaswani et al. 2017 (1706.03762) with its wavelengths in seconds.
    """
    angles = 2 * jnp.pi * times[..., None] / jnp.geomspace(*periods, TIME_WAVES)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
