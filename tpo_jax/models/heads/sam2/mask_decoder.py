"""Mask decoder of SAM 2: prompt tokens and cells of the frame read each other, then four masks with
their predicted IoU and one presence come out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.heads.sam2.image_encoder import ImageFeatures
from tpo_jax.models.heads.sam2.layers import (
    EPSILON,
    Attention,
    Conv,
    DoublingConv,
    FeedForward,
    table,
)
from tpo_jax.models.layers import LayerNorm, Linear, Rngs, stack
from tpo_jax.models.sam2_config import Sam2Config

# Mask 0 is for prompts that leave nothing open; the others are three readings of one that does.
MASKS = 4
LAYERS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """masks: float32[B, S, 4, m, m], logits. iou: float32[B, S, 4] in [0, 1]. presence:
    float32[B, S], logit. tokens: float32[B, S, 4, C], what each mask was made of."""

    masks: jax.Array
    iou: jax.Array
    presence: jax.Array
    tokens: jax.Array


class TwoWayLayer(nnx.Module):
    """Tokens among themselves, tokens to cells, an MLP on tokens, cells to tokens; post-norm."""

    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width, heads = config.width, config.decoder_heads
        self.self_attn = Attention(width, width, heads, rngs=rngs)
        self.layer_norm1 = LayerNorm(width, epsilon=EPSILON)
        self.token_to_image = Attention(width, width // 2, heads, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=EPSILON)
        self.fc1 = Linear(width, config.decoder_mlp_width, rngs=rngs)
        self.fc2 = Linear(config.decoder_mlp_width, width, rngs=rngs)
        self.layer_norm3 = LayerNorm(width, epsilon=EPSILON)
        self.image_to_token = Attention(width, width // 2, heads, rngs=rngs)
        self.layer_norm4 = LayerNorm(width, epsilon=EPSILON)

    def __call__(
        self,
        tokens: jax.Array,
        cells: jax.Array,
        prompt: jax.Array,
        position: jax.Array,
        visible: jax.Array | None,
        *,
        first: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """tokens, prompt float[rows, n, C]; cells float[rows, hw, C]; position float[hw, C];
        visible bool[rows, n], the tokens that are there, None: all.

        The first layer gets the prompt as its tokens, so they are not their own position there.
        """
        if first:
            tokens = self.self_attn(tokens, tokens, tokens, visible)
        else:
            placed = tokens + prompt
            tokens = tokens + self.self_attn(placed, placed, tokens, visible)
        tokens = self.layer_norm1(tokens)
        read = self.token_to_image(tokens + prompt, cells + position, cells)
        tokens = self.layer_norm2(tokens + read)
        tokens = self.layer_norm3(tokens + self.fc2(jax.nn.relu(self.fc1(tokens))))
        read = self.image_to_token(cells + position, tokens + prompt, tokens, visible)
        return tokens, self.layer_norm4(cells + read)


class MaskDecoder(nnx.Module):
    def __init__(self, config: Sam2Config, *, rngs: Rngs):
        width = config.width
        self.presence_token = table(rngs, 1, width)
        self.iou_token = table(rngs, 1, width)
        self.mask_tokens = table(rngs, MASKS, width)
        self.layers = nnx.Dict({f"layer{i}": TwoWayLayer(config, rngs=rngs) for i in range(LAYERS)})
        self.final_attn = Attention(width, width // 2, config.decoder_heads, rngs=rngs)
        self.final_norm = LayerNorm(width, epsilon=EPSILON)
        self.fine_conv = Conv(width, width // 8, 1, rngs=rngs)
        self.middle_conv = Conv(width, width // 4, 1, rngs=rngs)
        self.upscale1 = DoublingConv(width, width // 4, rngs=rngs)
        self.upscale_norm = LayerNorm(width // 4)
        self.upscale2 = DoublingConv(width // 4, width // 8, rngs=rngs)
        self.mask_mlps = stack(
            lambda rngs: FeedForward(width, width, width // 8, rngs=rngs), MASKS, rngs
        )
        self.iou_mlp = FeedForward(width, config.iou_width, MASKS, rngs=rngs)
        self.presence_mlp = FeedForward(width, width, 1, rngs=rngs)

    def __call__(
        self,
        top: jax.Array,
        features: ImageFeatures,
        prompt: jax.Array,
        position: jax.Array,
        prompt_valid: jax.Array | None = None,
    ) -> Decoded:
        """
        Args:
          top: float32[B, S, h, w, C], cells of the frame as each object sees them, with the mask
            prompt (or the one for none) added.
          features: [B, S or 1, ...], of which `fine` and `middle` are read.
          prompt: float32[B, S, n, C].
          position: float32[h, w, C].
          prompt_valid: bool[B, S, n], tokens of the prompt that are there; None: all.
        """
        B, S, h, w, C = top.shape
        own = jnp.concatenate(
            [self.presence_token[...], self.iou_token[...], self.mask_tokens[...]]
        )
        prompt = prompt.reshape(B * S, -1, C)
        prompt = jnp.concatenate([jnp.broadcast_to(own, (B * S, *own.shape)), prompt], axis=1)
        cells, position = top.reshape(B * S, h * w, C), position.reshape(h * w, C)
        visible = None
        if prompt_valid is not None:
            visible = prompt_valid.reshape(B * S, -1)
            visible = jnp.pad(visible, ((0, 0), (len(own), 0)), constant_values=True)
        tokens = prompt
        for number, layer in enumerate(self.layers.values()):
            tokens, cells = layer(tokens, cells, prompt, position, visible, first=number == 0)
        read = self.final_attn(tokens + prompt, cells + position, cells)
        tokens = self.final_norm(tokens + read).reshape(B, S, -1, C)
        pixels = self._pixels(cells.reshape(top.shape), features)
        mask_tokens = tokens[:, :, 2 : 2 + MASKS]
        return Decoded(
            masks=jnp.einsum("bskc,bshwc->bskhw", self._queries(mask_tokens), pixels),
            iou=jax.nn.sigmoid(self.iou_mlp(tokens[:, :, 1])),
            presence=self.presence_mlp(tokens[:, :, 0])[..., 0],
            tokens=mask_tokens,
        )

    def _pixels(self, cells: jax.Array, features: ImageFeatures) -> jax.Array:
        """float[B, S, h, w, C] -> float[B, S, 4h, 4w, C/8]."""
        x = self.upscale_norm(self.upscale1(cells) + features.middle)
        x = self.upscale2(jax.nn.gelu(x, approximate=False)) + features.fine
        return jax.nn.gelu(x, approximate=False)

    def _queries(self, tokens: jax.Array) -> jax.Array:
        """float[B, S, 4, C] -> float[B, S, 4, C/8], each mask by its own MLP."""
        structure, parameters = nnx.split(self.mask_mlps)

        def one(parameters: nnx.State, token: jax.Array) -> jax.Array:
            return nnx.merge(structure, parameters)(token)

        return jax.vmap(one, in_axes=(0, 2), out_axes=2)(parameters, tokens)


def choose(decoded: Decoded, single: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    """The mask that is answered and the one whose token becomes the pointer, int32[B, S] each.

    Of an open prompt both are the best of the three by predicted IoU. Where `single`, both are mask
    0, but an unstable one (its area changes by more than 2 % between logits of +-0.05) gives way to
    the best of the three as the answer.
    """
    best = 1 + jnp.argmax(decoded.iou[..., 1:], axis=-1)
    inner = jnp.sum(decoded.masks[:, :, 0] > 0.05, axis=(-2, -1))
    outer = jnp.sum(decoded.masks[:, :, 0] > -0.05, axis=(-2, -1))
    stable = inner >= 0.98 * outer
    answer = jnp.where(single & stable, 0, best)
    return answer, jnp.where(single, 0, best)


def pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """float[B, S, 4, ...], int32[B, S] -> float[B, S, ...]."""
    index = index.reshape(*index.shape, *[1] * (values.ndim - index.ndim))
    return jnp.take_along_axis(values, index, axis=2)[:, :, 0]
