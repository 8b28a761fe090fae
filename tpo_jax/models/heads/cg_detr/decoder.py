"""Decoder of the CG-DETR head: queries that are (centre, width) anchors, refined layer by layer.

After DAB-DETR (Liu et al. 2022, 2201.12329) in one dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.heads.cg_detr.layers import (
    FeedForward,
    ReluMlp,
    attend,
    inverse_sigmoid,
    norm,
    sine_waves,
)
from tpo_jax.models.layers import Linear, Rngs

# Attention is divided by an anchor's width, which this keeps from 0. The release has no bound;
# this one is a thousandth of the smallest width from which anchors are refined (inverse_sigmoid).
_MIN_WIDTH = 1e-6


class DecoderLayer(nnx.Module):
    """Self-attention of the queries, then attention to clips by content and by place."""

    def __init__(self, width: int, heads: int, first: bool, *, rngs: Rngs):
        def linear() -> Linear:
            return Linear(width, width, rngs=rngs)

        self.self_proj = nnx.Dict(
            {name: linear() for name in ("q", "q_place", "k", "k_place", "v", "o")}
        )
        self.cross_proj = nnx.Dict(
            {name: linear() for name in ("q", "q_wave", "k", "k_place", "v", "o")}
        )
        # Only the first layer, whose contents are still empty, adds places to contents.
        self.q_place = linear() if first else None
        self.self_norm, self.cross_norm, self.final_norm = (norm(width) for _ in range(3))
        self.feed_forward = FeedForward(width, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        x: jax.Array,
        place: jax.Array,
        waves: jax.Array,
        memory: jax.Array,
        memory_position: jax.Array,
        valid: jax.Array,
    ) -> jax.Array:
        """float[n, Q, C] queries, their places and waves; memory float[n, F, C], bool[n, F]."""
        p = self.self_proj
        q, k = p["q"](x) + p["q_place"](place), p["k"](x) + p["k_place"](place)
        mixed, _ = attend(q, k, p["v"](x), self.heads, jnp.ones(x.shape[:2], bool))
        x = self.self_norm(x + p["o"](mixed))

        p = self.cross_proj
        q, k, k_place = p["q"](x), p["k"](memory), p["k_place"](memory_position)
        k_place = jnp.broadcast_to(k_place, k.shape)
        if self.q_place is not None:
            q, k = q + self.q_place(place), k + k_place
        mixed, _ = attend(
            self._beside(q, p["q_wave"](waves)), self._beside(k, k_place), p["v"](memory),
            self.heads, valid,
        )  # fmt: skip
        x = self.cross_norm(x + p["o"](mixed))
        return self.final_norm(x + self.feed_forward(x))

    def _beside(self, content: jax.Array, place: jax.Array) -> jax.Array:
        """Content and place of each attention head side by side: float[n, T, 2 * C]."""
        parts = [x.reshape(*x.shape[:2], self.heads, -1) for x in (content, place)]
        return jnp.concatenate(parts, axis=-1).reshape(*content.shape[:2], -1)


class Decoder(nnx.Module):
    """Spans with a foreground score from clips."""

    def __init__(self, width: int, heads: int, depth: int, queries: int, *, rngs: Rngs):
        draw = jax.random.normal(rngs.params(), (queries, 2), jnp.float32)
        self.embed = nnx.Dict({"anchors": nnx.Param(draw)})
        self.layers = nnx.Dict(
            {f"layer{i}": DecoderLayer(width, heads, i == 0, rngs=rngs) for i in range(depth)}
        )
        self.place = ReluMlp((width, width, width), rngs=rngs)
        self.wave_scale = ReluMlp((width, width, width), rngs=rngs)
        self.width_scale = ReluMlp((width, width, 1), rngs=rngs)
        # Anchors do not move at first.
        self.refine = ReluMlp((width, width, width, 2), rngs=rngs, last_scale=0.0)
        self.norm = norm(width)
        self.span = ReluMlp((width, width, width, 2), rngs=rngs)
        self.foreground = Linear(width, 2, rngs=rngs)

    def __call__(
        self, memory: jax.Array, position: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions of every layer.

        Args:
          memory: float[n, F, C]; position: float[n, F, C]; valid: bool[n, F].

        Returns: logits float[n, layers, Q, 2] of foreground and background, and spans
          float[n, layers, Q, 2], centre and width in [0, 1].
        """
        n, _, C = memory.shape
        anchors = jax.nn.sigmoid(self.embed["anchors"][...].astype(memory.dtype))
        anchors = jnp.broadcast_to(anchors, (n, *anchors.shape))
        x = jnp.zeros((*anchors.shape[:2], C), memory.dtype)
        reached, logits, spans = anchors, [], []
        for i, layer in enumerate(self.layers.values()):
            waves = sine_waves(anchors, C // 2).reshape(*anchors.shape[:2], C)
            place = self.place(waves)
            scale = jax.nn.sigmoid(self.width_scale(x)) / jnp.maximum(anchors[..., 1:], _MIN_WIDTH)
            waves = waves * scale * (self.wave_scale(x) if i else 1.0)
            x = layer(x, place, waves, memory, position, valid)
            state = self.norm(x)
            logits.append(self.foreground(state))
            spans.append(jax.nn.sigmoid(self.span(state) + inverse_sigmoid(reached)))
            # The next layer starts from the refined anchors; only its prediction trains them.
            reached = jax.nn.sigmoid(self.refine(x) + inverse_sigmoid(anchors))
            anchors = jax.lax.stop_gradient(reached)
        return jnp.stack(logits, axis=1), jnp.stack(spans, axis=1)
