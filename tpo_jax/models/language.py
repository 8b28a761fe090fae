"""Decoder-only language model of the Llama / Mistral / Qwen family, over prefix and branches.

A row is one prefix and K branches that do not see each other. Calling the model runs both, layer by
layer, as training does. `prefill` runs the prefix alone and returns its key/value cache; `extend`
runs branches against it, all at once, or some tokens at a time with a cache of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.attention import branch_attention, padding_last, prefix_attention
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.layers import (
    Carry,
    Linear,
    RMSNorm,
    Rngs,
    dropout,
    fold_rows,
    recomputed,
    run_layers,
    stack,
)
from tpo_jax.models.rope import Tables, rotary_tables, rotate
from tpo_jax.parallel.context import ContextLayout, split_tokens
from tpo_jax.parallel.rules import constrain_lookup, constrain_rows

KeyValues = tuple[jax.Array, jax.Array]  # of one layer, float[..., T, G, H]; keys are rotated
# Function of (q, k, v) -> float[..., T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer.

    k, v: float[L, B, P, G, H] for a prefix, float[L, B, K, R, G, H] for branches. On a mesh with a
      `context` axis the P tokens lie as parallel.context.ContextLayout places them, and in a model
      with a sliding window in the order of `padding_last`.
    segments: None for a prefix; int32[B, K, R] for branches, segment of each cached token.
    positions: int32 of the shape of the cached tokens; None in a model without a sliding window.
    """

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None = None
    positions: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the layers have the tokens of a prefix: in `order` int32[B, P] (None: as they come),
    and then as `layout` puts them."""

    layout: ContextLayout
    order: jax.Array | None

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, P, ...] as it comes -> [B, P', ...] placed."""
        return self.layout.spread(x if self.order is None else _taken(x, self.order))

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `spread`."""
        x = self.layout.restore(x)
        return x if self.order is None else _taken(x, jnp.argsort(self.order, axis=1))


def _taken(x: jax.Array, places: jax.Array) -> jax.Array:
    """[B, P, ...] at int32[B, P]."""
    return jnp.take_along_axis(x, jnp.expand_dims(places, range(2, x.ndim)), axis=1)


# Where a layer drops something, in the order of the numbers that tell the masks apart: what goes
# into the residual stream, and what adapters read.
_DROPS = (
    "attention", "mlp", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def _keys_of(name: str, keys: jax.Array | None) -> jax.Array | None:
    """Of the keys of a layer [*rows], those of one place in it."""
    return fold_rows(keys, _DROPS.index(name))


class DecoderAttention(nnx.Module):
    def __init__(self, config: LanguageConfig, *, rngs: Rngs):
        self.config = config
        query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        bias = config.qkv_bias
        self.q_proj = Linear(config.width, query_width, bias=bias, rngs=rngs)
        self.k_proj = Linear(config.width, kv_width, bias=bias, rngs=rngs)
        self.v_proj = Linear(config.width, kv_width, bias=bias, rngs=rngs)
        scale = (2.0 * config.depth) ** -0.5
        self.o_proj = Linear(
            query_width, config.width, bias=config.output_bias, rngs=rngs, scale=scale
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)
            self.k_norm = RMSNorm(config.head_dim, epsilon=config.norm_epsilon)

    def project(
        self, x: jax.Array, tables: Tables, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float[..., T, D] -> q float[..., T, N, H], k and v float[..., T, G, H]; q, k rotated."""
        q, k, v = (
            getattr(self, name)(x, _keys_of(name, keys)).reshape(
                *x.shape[:-1], -1, self.config.head_dim
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, tables), rotate(k, tables), v

    def output(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """float[..., T, N, H] -> float[..., T, D]."""
        return self.o_proj(x.reshape(*x.shape[:-2], -1), _keys_of("o_proj", keys))


class GatedMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageConfig, *, rngs: Rngs):
        width, hidden = config.width, config.mlp_width
        self.gate_proj = Linear(width, hidden, bias=False, rngs=rngs)
        self.up_proj = Linear(width, hidden, bias=False, rngs=rngs)
        scale = (2.0 * config.depth) ** -0.5
        self.down_proj = Linear(hidden, width, bias=False, rngs=rngs, scale=scale)

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """float[..., D] -> float[..., D]; `keys` are those of dropout, or None."""
        gate = self.gate_proj(x, _keys_of("gate_proj", keys))
        hidden = _gated(gate, self.up_proj(x, _keys_of("up_proj", keys)))
        return self.down_proj(hidden, _keys_of("down_proj", keys))


@recomputed
def _gated(gate: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * x


class DecoderBlock(nnx.Module):
    """Pre-norm block; parameter names follow Hugging Face's Llama."""

    def __init__(self, config: LanguageConfig, *, rngs: Rngs):
        self.input_layernorm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.self_attn = DecoderAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        self.mlp = GatedMlp(config, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self, x: jax.Array, tables: Tables, attend: Attend, keys: jax.Array | None
    ) -> tuple[jax.Array, KeyValues]:
        """One layer.

        Args:
          x: float[..., T, D].
          tables: rotary tables of the T positions.
          attend: function of (q, k, v) -> float[..., T, N, H].
          keys: dropout keys of this layer, one per row, or None.

        Returns: x, (k, v) of these tokens.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), tables, keys)
        mixed = self.self_attn.output(attend(q, k, v), keys)
        x = x + dropout(mixed, _keys_of("attention", keys), self.dropout)
        hidden = self.mlp(self.post_attention_layernorm(x), keys)
        return x + dropout(hidden, _keys_of("mlp", keys), self.dropout), (k, v)


class LanguageModel(nnx.Module):
    def __init__(self, config: LanguageConfig, *, rngs: Rngs):
        self.config = config
        draw = jax.random.normal(rngs.params(), (config.vocab_size, config.width), jnp.float32)
        self.embed = nnx.Dict(table=nnx.Param(draw * config.width**-0.5))
        self.layers = stack(lambda rngs: DecoderBlock(config, rngs=rngs), config.depth, rngs)
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tied_head:
            self.lm_head = Linear(config.width, config.vocab_size, bias=False, rngs=rngs)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32[B, ...] -> float32[B, ..., D]."""
        looked_up = constrain_lookup(jnp.take(self.embed["table"][...], tokens, axis=0))
        # Else the layers would keep columns apart as well, and exchange them in every layer.
        return constrain_rows(looked_up)

    @property
    def table(self) -> jax.Array:
        """Output table float[V, D]: logits = hidden @ table.T."""
        if self.config.tied_head:
            return self.embed["table"][...]
        return self.lm_head.merged_kernel.T

    def __call__(
        self,
        prefix: tuple[jax.Array, jax.Array, jax.Array],
        branches: tuple[jax.Array, jax.Array, jax.Array],
        keys: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Whole rows: the same as `prefill` and then `extend`, in one loop over the layers.

        The weights of a layer are read (on a mesh: gathered) once, and no cache of all layers is
        kept for the backward pass.

        Args:
          prefix: embeds float[B, P, D], positions and segments int32[B, P].
          branches: embeds float[B, K, R, D], positions and segments int32[B, K, R], likewise.
          keys: key arrays [B] and [B, K] for dropout, or None.

        Returns: hidden float[B, P, D] and float[B, K, R, D] after the final norm.
        """
        places = self._places(prefix[2])
        embeds, positions, segments = map(places.spread, prefix)
        prefix_keys, branch_keys = (None, None) if keys is None else keys
        prefix_layer = self._prefix_layer(positions, segments, prefix_keys, places.layout)
        branch_layer = self._branch_layer(*branches[1:], positions, segments, branch_keys)

        def apply(
            window: int | None, layer: DecoderBlock, carry: tuple[jax.Array, jax.Array],
            number: jax.Array,
        ) -> tuple[tuple[jax.Array, jax.Array], None]:  # fmt: skip
            x, own = carry
            x, prefix_kv = prefix_layer(window, layer, x, number)
            own, _ = branch_layer(window, layer, own, (number, prefix_kv, None))
            return (x, own), None

        numbers = jnp.arange(self.config.depth)
        (x, own), _ = self._run(apply, (embeds, branches[0]), numbers)
        return places.restore(self.final_norm(x)), self.final_norm(own)

    def _places(self, segments: jax.Array) -> _Places:
        """The places of prefixes with these segments, int32[B, P]."""
        slides = self.config.sliding_window is not None
        return _Places(
            ContextLayout.of(segments.shape[1]), padding_last(segments) if slides else None
        )

    def prefill(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs prefixes, causally.

        Args:
          embeds: float[B, P, D].
          positions: int32[B, P], rotary positions.
          segments: int32[B, P]; 0 is padding, other numbers are independent packed prefixes.
          keys: key array [B] for dropout, or None.

        Returns: hidden float[B, P, D] after the final norm, and the cache.
        """
        places = self._places(segments)
        embeds, positions, segments = map(places.spread, (embeds, positions, segments))
        apply = self._prefix_layer(positions, segments, keys, places.layout)
        x, (k, v) = self._run(apply, embeds, jnp.arange(self.config.depth))
        slides = self.config.sliding_window is not None
        cache = KVCache(k, v, positions=positions if slides else None)
        return places.restore(self.final_norm(x)), cache

    def layer_states(
        self, embeds: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> jax.Array:
        """float[L, B, P, D], what each layer of `prefill` hands on, before the final norm."""
        places = self._places(segments)
        places = dataclasses.replace(places, layout=ContextLayout(embeds.shape[1], 1))
        embeds, positions, segments = map(places.spread, (embeds, positions, segments))
        run = self._prefix_layer(positions, segments, None, places.layout)

        def apply(
            window: int | None, layer: DecoderBlock, x: jax.Array, number: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            x, _ = run(window, layer, x, number)
            return x, x

        states = self._run(apply, embeds, jnp.arange(self.config.depth))[1]
        return jax.vmap(places.restore)(states)

    def _prefix_layer(
        self, positions: jax.Array, segments: jax.Array, keys: jax.Array | None,
        layout: ContextLayout,
    ) -> Callable[..., tuple[jax.Array, KeyValues]]:  # fmt: skip
        tables = self._tables(positions)

        def apply(
            window: int | None, layer: DecoderBlock, x: jax.Array, index: jax.Array
        ) -> tuple[jax.Array, KeyValues]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return prefix_attention(
                    q, k, v, segments, layout, window=window, backend=self.config.attention
                )

            x = split_tokens(x, axis=1)
            return layer(x, tables, attend, fold_rows(keys, index))

        return apply

    def extend(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        prefix: KVCache,
        prefix_segments: jax.Array,
        own: KVCache | None = None,
        index: jax.Array | int = 0,
        keys: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs branches against their prefix.

        Args:
          embeds: float[B, K, T, D].
          positions: int32[B, K, T].
          segments: int32[B, K, T]; a token sees prefix tokens and own tokens of its segment.
          prefix: cache of `prefill`.
          prefix_segments: int32[B, P].
          own: None in training: the T tokens are the whole branch. In generation the cache of
            `empty_cache`, into which the T tokens are written at `index` (traced int32[]), and of
            which they see what is at or before them.
          index: write position; used only with `own`.
          keys: key array [B, K] for dropout, or None.

        Returns: hidden float[B, K, T, D] after the final norm, and the updated `own`.
        """
        prefix_segments = self._places(prefix_segments).spread(prefix_segments)
        apply = self._branch_layer(
            positions, segments, prefix.positions, prefix_segments, keys, own, index
        )
        inputs = (
            jnp.arange(self.config.depth), (prefix.k, prefix.v),
            None if own is None else (own.k, own.v),
        )  # fmt: skip
        x, written = self._run(apply, embeds, inputs)
        if own is None:
            return self.final_norm(x), None
        own_segments, own_positions = self._own(positions, segments, own, index)
        return self.final_norm(x), KVCache(*written, own_segments, own_positions)

    def _own(
        self, positions: jax.Array, segments: jax.Array, own: KVCache | None, index: jax.Array | int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Segments and (with a sliding window) positions of what a branch has of its own."""
        slides = self.config.sliding_window is not None
        if own is None:
            return segments, positions if slides else None
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=2
        )
        return write(own.segments, segments), write(own.positions, positions) if slides else None

    def _branch_layer(
        self, positions: jax.Array, segments: jax.Array, prefix_positions: jax.Array | None,
        prefix_segments: jax.Array, keys: jax.Array | None, own: KVCache | None = None,
        index: jax.Array | int = 0,
    ) -> Callable[..., tuple[jax.Array, KeyValues | None]]:  # fmt: skip
        tables = self._tables(positions)
        own_segments, own_positions = self._own(positions, segments, own, index)
        all_positions = (positions, prefix_positions, own_positions)

        def apply(
            window: int | None, layer: DecoderBlock, x: jax.Array,
            inputs: tuple[jax.Array, KeyValues, KeyValues | None],
        ) -> tuple[jax.Array, KeyValues | None]:  # fmt: skip
            number, prefix_kv, own_kv = inputs
            written = None

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal written
                offset = 0
                if own_kv is not None:
                    k, v = (
                        jax.lax.dynamic_update_slice_in_dim(
                            old, new.astype(old.dtype), index, axis=2
                        )
                        for old, new in zip(own_kv, (k, v), strict=True)
                    )
                    written, offset = (k, v), jnp.asarray(index, jnp.int32)
                return branch_attention(
                    q, *prefix_kv, k, v, q_segments=segments, prefix_segments=prefix_segments,
                    own_segments=own_segments, own_offset=offset, window=window,
                    positions=None if window is None else all_positions,
                    backend=self.config.attention,
                )  # fmt: skip

            # Prefix layers fold L numbers from their keys, branches the next L.
            layer_keys = fold_rows(keys, self.config.depth + number)
            x, _ = layer(split_tokens(x, axis=2), tables, attend, layer_keys)
            return x, written

        return apply

    def _tables(self, positions: jax.Array) -> Tables:
        config = self.config
        return rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)

    def _run(
        self, apply: Callable[..., tuple[Carry, Any]], x: Carry, inputs: Any
    ) -> tuple[Carry, Any]:
        """run_layers of apply(window, layer, carry, inputs); runs of one window are one loop."""
        config = self.config
        structure, parameters = nnx.split(self.layers)
        outputs = []
        for first, end, window in config.windows:
            layers, part = self.layers, inputs
            if (first, end) != (0, config.depth):
                cut = functools.partial(jax.lax.slice_in_dim, start_index=first, limit_index=end)
                layers = nnx.merge(structure, jax.tree.map(cut, parameters))
                part = jax.tree.map(cut, inputs)
            x, output = run_layers(
                layers, functools.partial(apply, window), x, part, remat=config.remat,
                unroll=config.unroll,
            )  # fmt: skip
            outputs.append(output)
        if len(outputs) == 1:
            return x, outputs[0]
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    def empty_cache(self, rows: int, branches: int, length: int, dtype: jnp.dtype) -> KVCache:
        """Own cache for `extend`: room for `length` tokens in each of rows x branches."""
        config = self.config
        shape = (config.depth, rows, branches, length, config.kv_heads, config.head_dim)
        return KVCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
            # -1 matches no query: what is not written yet is not seen.
            jnp.full((rows, branches, length), -1, jnp.int32),
            None if config.sliding_window is None
            else jnp.zeros((rows, branches, length), jnp.int32),
        )  # fmt: skip


def bind(config: LanguageConfig, params: Mapping[str, Any]) -> LanguageModel:
    """The language model alone with these parameters, nested without the leading "language"; use
    it inside jit. (The whole model is FunctionalModel's.)"""
    structure = nnx.graphdef(_abstract(config))
    return nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, dict(params))))


def abstract(config: LanguageConfig) -> dict[str, Any]:
    """Parameters of the language model alone, nested as `bind` takes them, of
    jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(nnx.state(_abstract(config)))


def _abstract(config: LanguageConfig) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=Rngs(0)))
