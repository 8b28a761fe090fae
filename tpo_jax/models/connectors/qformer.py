"""Q-Former (Li et al. 2023, 2301.12597): BERT layers whose queries read the patches of a clip.

Post-norm layers; those with an even number also attend to the clip. Layers are stacked by pairs.
Only the rows of queries exist here, so BERT's own word embeddings and feed-forward do not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.layers import LayerNorm, Linear, Rngs, exact_gelu, run_layers, stack
from tpo_jax.models.vision import VisionFeatures

EPSILON = 1e-12


class BertAttention(nnx.Module):
    """norm(x + dense(attention(x, tokens)))."""

    def __init__(self, config: QFormerConfig, tokens_width: int, *, rngs: Rngs):
        width = config.width
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(tokens_width, width, rngs=rngs)
        self.value = Linear(tokens_width, width, rngs=rngs)
        self.dense = Linear(width, width, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=EPSILON)
        self.heads = config.heads

    def __call__(self, x: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """float[B, Q, D], float[B, S, C], bool[B, S] -> float[B, Q, D]."""
        B, Q, D = x.shape
        q, k, v = (
            part.reshape(B, -1, self.heads, D // self.heads)
            for part in (self.query(x), self.key(tokens), self.value(tokens))
        )
        out = attention(
            q, k, v, q_segments=jnp.ones((B, Q), jnp.int32), kv_segments=valid.astype(jnp.int32)
        )
        return self.norm(x + self.dense(out.reshape(B, Q, D)))


class BertMlp(nnx.Module):
    """norm(x + fc2(gelu(fc1(x))))."""

    def __init__(self, config: QFormerConfig, *, rngs: Rngs):
        self.fc1 = Linear(config.width, config.mlp_width, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, rngs=rngs)
        self.norm = LayerNorm(config.width, epsilon=EPSILON)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, Q, D] -> float[B, Q, D]."""
        return self.norm(x + self.fc2(exact_gelu(self.fc1(x))))


class QFormerLayer(nnx.Module):
    def __init__(self, config: QFormerConfig, tokens_width: int | None, *, rngs: Rngs):
        """`tokens_width` None: a layer that does not read the clip."""
        self.attention = BertAttention(config, config.width, rngs=rngs)
        if tokens_width is not None:
            self.crossattention = BertAttention(config, tokens_width, rngs=rngs)
        self.mlp = BertMlp(config, rngs=rngs)
        self.reads = tokens_width is not None

    def __call__(self, x: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """queries float[B, Q, D], clip float[B, S, C] and valid bool[B, S] -> float[B, Q, D]."""
        x = self.attention(x, x, jnp.ones(x.shape[:2], bool))
        if self.reads:
            x = self.crossattention(x, tokens, valid)
        return self.mlp(x)


class LayerPair(nnx.Module):
    def __init__(self, config: QFormerConfig, tokens_width: int, *, rngs: Rngs):
        self.even = QFormerLayer(config, tokens_width, rngs=rngs)
        self.odd = QFormerLayer(config, None, rngs=rngs)

    def __call__(self, x: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """Arguments and result as of `QFormerLayer`: float[B, Q, D] -> float[B, Q, D]."""
        return self.odd(self.even(x, tokens, valid), tokens, valid)


class QFormer(nnx.Module):
    def __init__(self, config: QFormerConfig, width: int, language_width: int, *, rngs: Rngs):
        def queries(number: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), (1, number, config.width), jnp.float32)
            return nnx.Param(0.02 * draw)

        self.query_tokens = queries(config.queries)
        if config.extra_queries:
            self.extra_query_tokens = queries(config.extra_queries)
        self.embeddings_norm = LayerNorm(config.width, epsilon=EPSILON)
        self.layers = stack(
            lambda rngs: LayerPair(config, width, rngs=rngs), config.depth // 2, rngs
        )
        self.project_up = Linear(
            config.width, language_width, rngs=rngs, scale=language_width**-0.5
        )
        self.config = config

    def __call__(self, features: VisionFeatures, frame_valid: jax.Array) -> jax.Array:
        """float[B, queries + extra_queries, D]; absent frames are not read."""
        patches = features.patches
        B, F, h, w, C = patches.shape
        tokens, valid = patches.reshape(B, F * h * w, C), jnp.repeat(frame_valid, h * w, axis=1)
        return self.project_up(self.read(tokens, valid))

    def read(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """float[B, S, C], bool[B, S] -> float[B, Q, D_qformer]."""
        x, _ = run_layers(
            self.layers, lambda layer, x, _: (layer(x, tokens, valid), None), self._first(tokens)
        )
        return x

    def states(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """What `read` computes on the way: float[1 + depth, B, Q, D_qformer], before the first
        layer and after each."""

        def both(pair: LayerPair, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            even = pair.even(x, tokens, valid)
            odd = pair.odd(even, tokens, valid)
            return odd, jnp.stack([even, odd])

        first = self._first(tokens)
        _, outputs = run_layers(self.layers, both, first)
        return jnp.concatenate([first[None], outputs.reshape(-1, *first.shape)])

    def _first(self, tokens: jax.Array) -> jax.Array:
        """The queries as they enter the first layer, float[B, Q, D_qformer]."""
        queries = self.query_tokens[...]
        if self.config.extra_queries:
            queries = jnp.concatenate([queries, self.extra_query_tokens[...]], axis=1)
        queries = jnp.broadcast_to(queries, (tokens.shape[0], *queries.shape[1:]))
        return self.embeddings_norm(queries.astype(tokens.dtype))
