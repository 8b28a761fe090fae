"""The connector of the LLaVA families: an MLP, pooling, newlines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.connectors.config import MlpConnectorConfig
from tpo_jax.models.connectors.pooling import append_token, interleave, pool_grid, with_newlines
from tpo_jax.models.layers import Linear, Rngs
from tpo_jax.models.vision import VisionFeatures


class MlpConnector(nnx.Module):
    """Layers are named as in `transformers`' multi_modal_projector."""

    def __init__(self, config: MlpConnectorConfig, width: int, language_width: int, *, rngs: Rngs):
        self.config = config
        scale = language_width**-0.5  # of token embeddings
        self.linear_1 = Linear(width, language_width, rngs=rngs)
        self.linear_2 = Linear(language_width, language_width, rngs=rngs, scale=scale)

        def vector() -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (language_width,), jnp.float32)
            return nnx.Param(draw * scale)

        if config.has_newline:
            self.image_newline = vector()
        if config.slow_every:
            self.faster_token = vector()

    def project(self, x: jax.Array) -> jax.Array:
        """float[..., D_vision] -> float[..., D]."""
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))

    def __call__(self, features: VisionFeatures, frame_valid: jax.Array) -> jax.Array:
        """float[B, V, D]; V is what config.visual_frames says, one frame is an image."""
        del frame_valid  # absent frames give tokens of their own, which nothing sees
        x = self.project(features.patches)
        if x.shape[1] == 1:
            return self._image(x)
        if self.config.class_token:
            return self._with_class_token(x, features.class_token)
        if self.config.slow_every:
            return self._slow_fast(x)
        newline = self.image_newline[...] if self.config.has_newline else None
        x = pool_grid(x, self.config.pool, self.config.stride)
        return with_newlines(x, newline, self.config.newline)

    @property
    def shows_whole(self) -> bool:
        """Whether tokens of an image in tiles are made of the whole image, too."""
        return self.config.image == "newline"

    def tiles(
        self,
        whole: VisionFeatures | None,
        tiles: VisionFeatures,
        index: jax.Array,
        weight: jax.Array,
    ) -> jax.Array:
        """Tokens float[B, V, D] of images in tiles.

        Args:
          whole: of one frame, the whole image; read if `shows_whole`.
          tiles: the T tiles as frames.
          index, weight: int32, float32[B, V, K], of `tiling.Tiling.tokens`; weights of tokens that
            are not there are 0.
        """
        patches = tiles.patches
        if self.shows_whole:
            patches = jnp.concatenate([whole.patches, patches], axis=1)
        x = self.project(patches)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.shows_whole:
            x = append_token(x, self.image_newline[...])
        tokens = jnp.zeros((*index.shape[:2], x.shape[-1]), jnp.float32)
        for k in range(index.shape[2]):  # K gathers: one of [B, V, K, D] would be K times as large
            part = jnp.take_along_axis(x, index[:, :, k, None], axis=1)
            tokens = tokens + weight[:, :, k, None] * part.astype(jnp.float32)
        return tokens.astype(x.dtype)

    def _image(self, x: jax.Array) -> jax.Array:
        if self.config.image == "pool":
            x = pool_grid(x, self.config.pool, self.config.stride)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return append_token(x, self.image_newline[...]) if self.config.image == "newline" else x

    def _with_class_token(self, x: jax.Array, class_token: jax.Array) -> jax.Array:
        B, F, h, w, D = x.shape
        first = self.project(class_token)[:, :, None]
        return jnp.concatenate([first, x.reshape(B, F, h * w, D)], axis=2).reshape(B, -1, D)

    def _slow_fast(self, x: jax.Array) -> jax.Array:
        config, frames = self.config, x.shape[1]
        slow = [f for f in range(frames) if f % config.slow_every == 0]
        fast = [f for f in range(frames) if f % config.slow_every]

        def tokens(chosen: list[int], stride: int) -> jax.Array:
            part = pool_grid(x[:, jnp.asarray(chosen, jnp.int32)], config.pool, stride)
            part = append_token(part, self.image_newline[...])
            part = part.reshape(*part.shape[:2], -1, part.shape[-1])
            return append_token(part, self.faster_token[...])

        slow_tokens = tokens(slow, config.stride)
        if not fast:
            return slow_tokens.reshape(slow_tokens.shape[0], -1, slow_tokens.shape[-1])
        return interleave(slow_tokens, tokens(fast, 2 * config.stride), config.slow_every, frames)
