"""SAM 2 (Ravi et al. 2024, 2408.00714): the network, without the order in which frames are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.heads.base import cell_centres
from tpo_jax.models.heads.sam2.image_encoder import ImageEncoder, ImageFeatures
from tpo_jax.models.heads.sam2.layers import (
    Conv,
    FeedForward,
    FourierPositions,
    resize_masks,
    sine_positions,
    table,
    time_waves,
)
from tpo_jax.models.heads.sam2.mask_decoder import Decoded, MaskDecoder
from tpo_jax.models.heads.sam2.memory import MemoryAttention, MemoryEncoder
from tpo_jax.models.heads.sam2.prompt_encoder import PromptEncoder
from tpo_jax.models.layers import Linear, Rngs
from tpo_jax.models.sam2_config import Sam2Config

# Logits of the masks of an object that is called absent, as memories see them.
ABSENT = -1024.0


class Sam2(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width, memory_width = config.width, config.memory_width
        self.config = config
        self.image_encoder = ImageEncoder(config, rngs=rngs)
        # Prompts are found among the cells by their places, so both have the same frequencies; as
        # in checkpoints they are two leaves.
        frequencies = rngs.params()
        self.image_positions = FourierPositions(width, frequencies)
        self.prompt_encoder = PromptEncoder(config, frequencies, rngs=rngs)
        self.mask_decoder = MaskDecoder(config, rngs=rngs)
        self.memory_attention = MemoryAttention(config, rngs=rngs)
        self.memory_encoder = MemoryEncoder(config, rngs=rngs)
        self.no_memory = table(rngs, 1, 1, width)
        self.memory_times = table(rngs, config.memories, 1, 1, memory_width)
        self.no_pointer = table(rngs, 1, width)
        self.occlusion = table(rngs, 1, memory_width) if config.occlusion_embedding else None
        self.mask_downsample = Conv(1, 1, 4, stride=4, rngs=rngs)
        self.pointer_mlp = FeedForward(width, width, width, rngs=rngs)
        self.pointer_time = Linear(width, memory_width, rngs=rngs) if config.pointer_times else None

    def features(self, images: jax.Array) -> ImageFeatures:
        """float32[..., H, W, 3], normalised, H = W = image_size -> float32[..., h, w, C]."""
        lead = images.shape[:-3]
        fine, middle, top = self.image_encoder(images.reshape(-1, *images.shape[-3:]))
        found = ImageFeatures(
            self.mask_decoder.fine_conv(fine), self.mask_decoder.middle_conv(middle), top
        )
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)

    def decode(
        self,
        top: jax.Array,
        features: ImageFeatures,
        prompt: jax.Array,
        mask: jax.Array | None = None,
        prompt_valid: jax.Array | None = None,
    ) -> Decoded:
        """Masks of S objects in each of B frames.

        Args:
          top: float32[B, S or 1, h, w, C], cells with memory (or `no_memory`) in them.
          features: [B, S or 1, ...].
          prompt: float32[B, S, n, C], of the prompt encoder.
          mask: float32[B, S, m, m], logits of a mask prompt.
          prompt_valid: bool[B, S, n], tokens that are there; None: all.
        """
        grid = self.config.grid
        position = self.image_positions(cell_centres(grid, grid)).reshape(grid, grid, -1)
        top = top + self.prompt_encoder.masks(mask)
        top = jnp.broadcast_to(top, (*prompt.shape[:2], *top.shape[2:]))
        return self.mask_decoder(top, features, prompt, position, prompt_valid)

    def pointer(self, token: jax.Array, present: jax.Array) -> jax.Array:
        """float32[..., C] of the decoder, bool[...] -> float32[..., C]."""
        return jnp.where(present[..., None], self.pointer_mlp(token), self.no_pointer[0])

    def remember(
        self, top: jax.Array, masks: jax.Array, present: jax.Array, *, binary: bool
    ) -> jax.Array:
        """What later frames read of this one, bfloat16[B, S, hw, Cm].

        Args:
          top: float32[B, S or 1, h, w, C], of `features`.
          masks: float32[B, S, m, m], logits; any m that resizes to image_size.
          present: bool[B, S].
          binary: whether masks were prompted, which makes their chances 0 or 1.
        """
        B, S = present.shape
        masks = jnp.where(present[..., None, None], masks, ABSENT)
        masks = resize_masks(masks, self.config.image_size)
        masks = (masks > 0).astype(jnp.float32) if binary else jax.nn.sigmoid(masks)
        top = jnp.broadcast_to(top, (B, S, *top.shape[2:]))
        rows = (x.reshape(B * S, *x.shape[2:]) for x in (top, masks))
        cells = self.memory_encoder(*rows).reshape(B, S, -1, self.config.memory_width)
        if self.occlusion is not None:
            cells = jnp.where(present[..., None, None], cells, cells + self.occlusion[0])
        return cells.astype(jnp.bfloat16)

    def read_memory(
        self,
        top: jax.Array,
        cells: jax.Array,
        ages: jax.Array,
        cells_valid: jax.Array,
        pointers: jax.Array,
        distances: jax.Array,
        pointers_valid: jax.Array,
    ) -> jax.Array:
        """Cells of a frame after they have read n memories and m pointers, of every object.

        Args:
          top: float32[B, S or 1, h, w, C].
          cells: bfloat16[B, S, n, hw, Cm].
          ages: int32[n], frames that a memory is old; 0 is the prompted frame's, however old.
          cells_valid: bool[B, S, n].
          pointers: float32[B, S, m, C].
          distances: float32[B, S, m], frames between, as a share of the longest.
          pointers_valid: bool[B, S, m].

        Returns: float32[B, S, h, w, C].
        """
        config = self.config
        B, S, n, hw, Cm = cells.shape
        rows, splits = B * S, config.width // Cm
        # Age 0 has the last entry.
        times = self.memory_times[:, 0, 0][(ages - 1) % config.memories]
        here = sine_positions(config.grid, Cm).reshape(-1, Cm)
        position = jnp.broadcast_to(here + times[:, None], (rows, n, hw, Cm))
        pointer_position = jnp.zeros((B, S, pointers.shape[2], Cm), jnp.float32)
        if self.pointer_time is not None:
            pointer_position = self.pointer_time(time_waves(distances, config.width))

        def tokens(x: jax.Array, times: int) -> jax.Array:
            return jnp.repeat(x.reshape(rows, -1, *x.shape[3:]), times, axis=1)

        memory = jnp.concatenate(
            [cells.astype(jnp.float32).reshape(rows, n * hw, Cm), pointers.reshape(rows, -1, Cm)],
            axis=1,
        )  # fmt: skip
        position = jnp.concatenate(
            [position.reshape(rows, n * hw, Cm), tokens(pointer_position, splits)], axis=1
        )
        visible = jnp.concatenate([tokens(cells_valid, hw), tokens(pointers_valid, splits)], axis=1)
        top = jnp.broadcast_to(top, (B, S, *top.shape[2:]))
        read = self.memory_attention(
            top.reshape(rows, hw, config.width), memory, position, visible, n
        )
        return read.reshape(top.shape)
