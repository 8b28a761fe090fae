"""Prefix + branches must equal plain causal rows, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import LanguageModel, rotary_tables, rotate

CONFIG = LanguageConfig(
    vocab_size=128, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, qkv_bias=True
)
P, R = 6, 5


@pytest.fixture(scope="module")
def model():
    return nnx.split(LanguageModel(CONFIG, rngs=nnx.Rngs(0)))


def _tokens(seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size)


def _plain(model, tokens):
    """One unpadded causal row: int32[T] -> float[T, D]."""
    T = tokens.shape[0]
    hidden, _ = model.prefill(
        model.embed_tokens(tokens[None]), jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
    )
    return hidden[0]


def _branched(model, prefix, branches, lengths):
    """int32[B, P], int32[B, K, R]; lengths[b][k] tokens of a branch are real."""
    B, K, R = branches.shape
    ones = jnp.ones((B, P), jnp.int32)
    hidden, cache = model.prefill(
        model.embed_tokens(prefix), jnp.tile(jnp.arange(P), (B, 1)), ones
    )
    segments = (jnp.arange(R) < jnp.asarray(lengths)[..., None]).astype(jnp.int32)
    positions = jnp.broadcast_to(P + jnp.arange(R), (B, K, R))
    out, _ = model.extend(model.embed_tokens(branches), positions, segments, cache, ones)
    return hidden, out


@pytest.mark.parametrize("K", [1, 2, 5])
def test_branches_equal_separate_rows_in_values_and_gradients(model, K):
    structure, state = model
    prefix, branches = _tokens(1, 2, P), _tokens(2, 2, K, R)
    lengths = 2 + np.arange(2 * K).reshape(2, K) % (R - 1)

    def shared(state):
        _, out = _branched(nnx.merge(structure, state), prefix, branches, lengths)
        return [out[b, k, : lengths[b, k]] for b in range(2) for k in range(K)]

    def separate(state):
        model = nnx.merge(structure, state)
        return [
            _plain(model, jnp.concatenate([prefix[b], branches[b, k, : lengths[b, k]]]))[P:]
            for b in range(2)
            for k in range(K)
        ]

    for got, want in zip(shared(state), separate(state), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)

    def scalar(rows):
        return lambda state: sum(jnp.sum(jnp.sin(3.0 * row)) for row in rows(state))

    got, want = jax.jit(jax.grad(scalar(shared)))(state), jax.grad(scalar(separate))(state)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_two_rows_packed_into_one_equal_two_rows(model):
    model = nnx.merge(*model)
    a, b = _tokens(3, 4), _tokens(4, 3)
    one, two = _tokens(5, 3), _tokens(6, 2)
    # Prefix: a | b | padding. Branch: one (continues a) | two (continues b) | padding.
    prefix = jnp.concatenate([a, b, jnp.zeros(2, jnp.int32)])[None]
    prefix_segments = jnp.array([[1] * 4 + [2] * 3 + [0] * 2])
    prefix_positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    _, cache = model.prefill(model.embed_tokens(prefix), prefix_positions, prefix_segments)
    branch = jnp.concatenate([one, two, jnp.zeros(1, jnp.int32)])[None, None]
    segments = jnp.array([[[1, 1, 1, 2, 2, 0]]])
    positions = jnp.array([[[4, 5, 6, 3, 4, 0]]])
    out, _ = model.extend(
        model.embed_tokens(branch), positions, segments, cache, prefix_segments
    )
    np.testing.assert_allclose(out[0, 0, :3], _plain(model, jnp.r_[a, one])[4:], atol=1e-5)
    np.testing.assert_allclose(out[0, 0, 3:5], _plain(model, jnp.r_[b, two])[3:], atol=1e-5)
    assert np.all(np.isfinite(out))


def test_padding_of_the_prefix_changes_nothing(model):
    model = nnx.merge(*model)
    prefix, branch = _tokens(7, 1, P), _tokens(8, 1, 1, R)
    _, want = _branched(model, prefix, branch, [[R]])
    segments = jnp.array([[1] * P + [0] * 3])
    longer = jnp.concatenate([prefix, jnp.full((1, 3), 9)], axis=1)
    _, cache = model.prefill(
        model.embed_tokens(longer), jnp.r_[jnp.arange(P), 0, 0, 0][None], segments
    )
    positions = P + jnp.arange(R)[None, None]
    got, _ = model.extend(
        model.embed_tokens(branch), positions, jnp.ones((1, 1, R), jnp.int32), cache, segments
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1,) * 5, (3, 2), (5,)])
def test_generation_cache_step_by_step_equals_one_pass(model, chunks):
    model = nnx.merge(*model)
    prefix, branches = _tokens(9, 2, P), _tokens(10, 2, 3, R)
    _, want = _branched(model, prefix, branches, np.full((2, 3), R))
    ones = jnp.ones((2, P), jnp.int32)
    _, cache = model.prefill(
        model.embed_tokens(prefix), jnp.tile(jnp.arange(P), (2, 1)), ones
    )
    own = model.empty_cache(2, 3, R + 2, jnp.float32)
    embeds = model.embed_tokens(branches)

    @jax.jit
    def step(embeds, own, index):
        T = embeds.shape[2]
        positions = jnp.broadcast_to(P + index + jnp.arange(T), (2, 3, T))
        return model.extend(
            embeds, positions, jnp.ones((2, 3, T), jnp.int32), cache, ones, own, index
        )

    start, pieces = 0, []
    for size in chunks:
        hidden, own = step(embeds[:, :, start : start + size], own, jnp.int32(start))
        pieces.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=2), want, atol=1e-5)


@pytest.mark.parametrize("changes", [{"unroll": True}, {"remat": True}])
def test_loop_remat_and_unrolled_layers_agree(model, changes):
    structure, state = model
    config = dataclasses.replace(CONFIG, **changes)
    other, _ = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    prefix, branches = _tokens(11, 1, P), _tokens(12, 1, 2, R)

    def total(state, structure):
        _, out = _branched(nnx.merge(structure, state), prefix, branches, [[R, R]])
        return jnp.sum(jnp.sin(3.0 * out))

    want, got = jax.grad(total)(state, structure), jax.grad(total)(state, other)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


class TestDropout:
    config = dataclasses.replace(CONFIG, dropout=0.3)

    def run(self, keys, tokens, rate_config=None):
        model = LanguageModel(rate_config or self.config, rngs=nnx.Rngs(0))
        B, T = tokens.shape
        positions, segments = jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32)
        return model.prefill(model.embed_tokens(tokens), positions, segments, keys)[0]

    def test_a_row_does_not_depend_on_its_place(self):
        keys, tokens = jax.random.split(jax.random.key(0), 3), _tokens(13, 3, P)
        forward = self.run(keys, tokens)
        np.testing.assert_allclose(self.run(keys[::-1], tokens[::-1])[::-1], forward, atol=1e-6)
        np.testing.assert_allclose(self.run(keys[1:2], tokens[1:2])[0], forward[1], atol=1e-6)

    def test_keys_matter_and_none_means_off(self):
        tokens = _tokens(14, 1, P)
        one = self.run(jax.random.split(jax.random.key(0), 1), tokens)
        two = self.run(jax.random.split(jax.random.key(1), 1), tokens)
        off = self.run(None, tokens)
        assert np.abs(one - two).max() > 1e-3
        np.testing.assert_array_equal(off, self.run(None, tokens, CONFIG))
        assert np.abs(one - off).max() > 1e-3


def test_rotary_positions_turn_pairs_half_a_head_apart():
    x = jax.random.normal(jax.random.key(0), (3, 2, 8))
    positions = jnp.array([0, 1, 7])
    turned = rotate(x, rotary_tables(positions, 8, 10000.0))
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angles = np.asarray(positions)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-5)


def test_tied_head_is_the_embedding_table():
    model = LanguageModel(dataclasses.replace(CONFIG, tied_head=True), rngs=nnx.Rngs(0))
    assert not hasattr(model, "lm_head")
    np.testing.assert_array_equal(model.table, model.embed["table"][...])
