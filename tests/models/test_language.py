"""Prefix and branches in any order of work, with windows, caches, meshes and dropout. That they are
plain causal rows, in values and gradients, is in test_shared_prefix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.checks import REMAT
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import LanguageModel
from tpo_jax.models.layers import Rngs
from tpo_jax.models.rope import RopeScaling, rotary_tables, rotate
from tpo_jax.models.video_language import branch_keys
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.rules import param_shardings, place

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
    """Unpadded causal rows: int32[rows, T] -> float[rows, T, D]."""
    rows, T = tokens.shape
    positions = jnp.tile(jnp.arange(T), (rows, 1))
    ones = jnp.ones((rows, T), jnp.int32)
    return model.prefill(model.embed_tokens(tokens), positions, ones)[0]


def _branched(model, prefix, branches, lengths):
    """int32[B, P], int32[B, K, R]; lengths[k] tokens of branch k are real -> float[B, K, R, D]."""
    B, K, R = branches.shape
    ones = jnp.ones((B, P), jnp.int32)
    positions = jnp.tile(jnp.arange(P), (B, 1))
    _, cache = model.prefill(model.embed_tokens(prefix), positions, ones)
    segments = (jnp.arange(R) < jnp.asarray(lengths)[..., None]).astype(jnp.int32)
    segments = jnp.broadcast_to(segments, (B, K, R))
    positions = jnp.broadcast_to(P + jnp.arange(R), (B, K, R))
    out, _ = model.extend(model.embed_tokens(branches), positions, segments, cache, ones)
    return out


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3, "full_layers": 1, "unroll": True}])
def test_a_whole_row_equals_its_prefix_and_then_its_branches(changes):
    config = dataclasses.replace(CONFIG, dropout=0.2, **changes)
    structure, state = nnx.split(LanguageModel(config, rngs=Rngs(1)))
    rows = jax.random.split(jax.random.key(9), 2)
    keys = rows, branch_keys(rows, 3)
    prefix_segments = jnp.array([[1] * P, [1] * 4 + [0] * 2])
    segments = jnp.broadcast_to(jnp.array([[1] * R, [1] * 3 + [0] * 2, [1] * R]), (2, 3, R))
    positions = jnp.tile(jnp.arange(P), (2, 1)), jnp.broadcast_to(P + jnp.arange(R), (2, 3, R))

    @jax.jit
    def both(state):
        model = nnx.merge(structure, state)
        prefix, branches = (model.embed_tokens(_tokens(i, 2, n)) for i, n in ((1, P), (2, 3 * R)))
        branches = branches.reshape(2, 3, R, -1)
        hidden, cache = model.prefill(prefix, positions[0], prefix_segments, keys[0])
        own, _ = model.extend(
            branches, positions[1], segments, cache, prefix_segments, keys=keys[1]
        )
        whole = model(
            (prefix, positions[0], prefix_segments), (branches, positions[1], segments), keys
        )
        return whole, (hidden, own)

    for got, want in zip(*both(state), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def _assert_close_gradients(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_generation_cache_in_any_steps_equals_one_pass(model):
    structure, state = model
    prefix, branches = _tokens(9, 2, P), _tokens(10, 2, 3, R)
    ones = jnp.ones((2, P), jnp.int32)

    @jax.jit
    def start(state):
        bound = nnx.merge(structure, state)
        positions = jnp.tile(jnp.arange(P), (2, 1))
        _, cache = bound.prefill(bound.embed_tokens(prefix), positions, ones)
        want = _branched(bound, prefix, branches, [R] * 3)
        return cache, bound.empty_cache(2, 3, R + 2, jnp.float32), want

    @jax.jit
    def step(state, tokens, cache, own, index):
        bound = nnx.merge(structure, state)
        T = tokens.shape[2]
        positions = jnp.broadcast_to(P + index + jnp.arange(T), (2, 3, T))
        segments = jnp.ones((2, 3, T), jnp.int32)
        embeds = bound.embed_tokens(tokens)
        return bound.extend(embeds, positions, segments, cache, ones, own, index)

    cache, empty, want = start(state)
    for chunks in [(1,) * 5, (3, 1, 1), (5,)]:
        at, own, pieces = 0, empty, []
        for size in chunks:
            tokens = branches[:, :, at : at + size]
            hidden, own = step(state, tokens, cache, own, jnp.int32(at))
            pieces.append(hidden)
            at += size
        np.testing.assert_allclose(jnp.concatenate(pieces, axis=2), want, atol=1e-5)


def _total(structure, state):
    """A number that all of a prefix and two branches decide."""
    out = _branched(nnx.merge(structure, state), _tokens(11, 1, P), _tokens(12, 1, 2, R), [R, R])
    return jnp.sum(jnp.sin(3.0 * out))


@pytest.fixture(scope="module")
def plain_gradient(model):
    structure, state = model
    return jax.jit(jax.value_and_grad(functools.partial(_total, structure)))(state)


@pytest.mark.parametrize(
    "changes", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}, {"remat": "dots_no_batch"}]
)
def test_loop_remat_and_unrolled_layers_agree(model, plain_gradient, changes):
    config = dataclasses.replace(CONFIG, **changes)
    other = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    total, gradient = jax.jit(jax.value_and_grad(functools.partial(_total, other)))(model[1])
    np.testing.assert_allclose(total, plain_gradient[0], rtol=1e-6)
    _assert_close_gradients(gradient, plain_gradient[1])


def test_unrolled_layers_on_a_cpu_take_the_sines_of_a_position_once():
    """XLA would put them into every rotation, where each head takes its own."""
    structure, state = _random(dataclasses.replace(CONFIG, unroll=True))

    def total(state, positions):
        model = nnx.merge(structure, state)
        tokens = model.embed_tokens(jnp.ones_like(positions))
        return model.prefill(tokens, positions, jnp.ones_like(positions))[0].sum()

    positions = jnp.zeros((2, P), jnp.int32)
    text = jax.jit(jax.grad(total)).lower(state, positions).compile().as_text()
    assert text.count(" sine(") == text.count(" cosine(") == 1


def test_remat_names_say_which_products_are_computed_again(model):
    products = {}
    for remat in REMAT:
        config = dataclasses.replace(CONFIG, remat=remat)
        structure = nnx.graphdef(nnx.eval_shape(lambda c=config: LanguageModel(c, rngs=Rngs(0))))
        gradient = jax.grad(functools.partial(_total, structure))
        products[remat] = str(jax.make_jaxpr(gradient)(model[1])).count("dot_general[")
    again = {remat: count - products[""] for remat, count in products.items()}
    # Scores and values of a prefix, and of branches with either part of what they see; for "full"
    # also 7 products with weights in a prefix and in branches, but for the last ones' results,
    # which no gradient reads.
    assert again == {"": 0, "dots": 0, "dots_no_batch": 6, "full": 6 + 2 * 6}


def _random(config):
    """(structure, state) with numpy weights: drawing them op by op takes longer than a test."""
    structure, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=Rngs(0))))
    random = np.random.default_rng(0)
    return structure, jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), jnp.float32), state
    )


def test_windows_norms_and_stretched_positions_hold_in_branches_and_caches():
    """A windowed model whose first layer sees everything: a prefix with padding, a prompt with
    padding and answers token by token equal one plain row."""
    config = dataclasses.replace(
        CONFIG, sliding_window=3, full_layers=1, qk_norm=True, output_bias=True,
        rope_scaling=RopeScaling("yarn", 4.0, original_length=8),
    )  # fmt: skip
    structure, state = _random(config)
    prefix, prompt, answer = _tokens(20, 1, P), _tokens(21, 1, 3), _tokens(22, 1, 4)

    @jax.jit
    def run(state):
        bound = nnx.merge(structure, state)
        want = _plain(bound, jnp.concatenate([prefix, prompt, answer], axis=1))
        embeds = bound.embed_tokens(jnp.pad(prefix, ((0, 0), (0, 2))))
        segments = jnp.array([[1] * P + [0] * 2])
        _, cache = bound.prefill(embeds, jnp.arange(P + 2)[None], segments)
        own = bound.empty_cache(1, 1, 5 + 4, jnp.float32)
        first, own = bound.extend(
            bound.embed_tokens(jnp.pad(prompt, ((0, 0), (0, 2))))[None],
            P + jnp.array([[[0, 1, 2, 0, 0]]]), jnp.array([[[1, 1, 1, 0, 0]]]), cache, segments,
            own, 0,
        )  # fmt: skip
        pieces = [first[0, 0, :3]]
        for i in range(4):
            out, own = bound.extend(
                bound.embed_tokens(answer[None, :, i : i + 1]), jnp.array([[[P + 3 + i]]]),
                jnp.ones((1, 1, 1), jnp.int32), cache, segments, own, jnp.int32(5 + i),
            )  # fmt: skip
            pieces.append(out[0, 0])
        return jnp.concatenate(pieces), want[0, P:]

    got, want = run(state)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_key_value_heads_that_do_not_divide_the_mesh():
    config = dataclasses.replace(CONFIG, width=32, heads=6, kv_heads=3)
    structure, state = _random(config)
    params = {"language": nnx.to_pure_dict(state)}
    tokens = _tokens(23, 4, 8)

    def run(params):
        bound = nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, params["language"])))
        return _plain(bound, tokens)

    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shardings = param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(place(jax.tree.map(np.asarray, params), shardings))
    np.testing.assert_allclose(got, jax.jit(run)(params), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "language.sliding_window=0: must be above 0"),
        ({"full_layers": 3}, "language.full_layers=3: must be in 0..depth=2"),
        ({"rope_scaling": {"kind": "longrope", "factor": 2.0}}, "kind='longrope': unknown"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "original_length=None"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, "factor=0.5: must be 1 or more"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0, "slope": 1}}, "slope: unknown key"),
    ],
)
def test_a_wrong_option_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@jax.jit
def _with_dropout(keys, tokens):
    """Prefix and K=2 branches of the same tokens -> float[B, P, D], float[B, 2, P, D]."""
    model = LanguageModel(dataclasses.replace(CONFIG, dropout=0.3), rngs=nnx.Rngs(0))
    B, T = tokens.shape
    positions, ones = jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32)
    embeds = model.embed_tokens(tokens)
    hidden, cache = model.prefill(embeds, positions, ones, keys)
    wide = [jnp.repeat(x[:, None], 2, axis=1) for x in (embeds, positions + T, ones)]
    own_keys = None if keys is None else branch_keys(keys, 2)
    branches, _ = model.extend(*wide, cache, ones, keys=own_keys)
    return hidden, branches


def test_dropout_of_a_row_does_not_depend_on_its_place():
    keys, tokens = jax.random.split(jax.random.key(0), 3), _tokens(13, 3, P)
    forward, backward = _with_dropout(keys, tokens), _with_dropout(keys[::-1], tokens[::-1])
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_allclose(a, b[::-1], atol=1e-6)
    alone = _with_dropout(keys[1:2], tokens[1:2])
    for a, b in zip(forward, alone, strict=True):
        # Products of another number of rows round differently; another mask would differ by 1e-3.
        np.testing.assert_allclose(a[1:2], b, atol=1e-5)
    branches = forward[1]
    assert np.abs(branches[:, 0] - branches[:, 1]).max() > 1e-3, "branches share a mask"


def test_dropout_follows_its_keys_and_none_means_off():
    tokens = _tokens(14, 1, P)
    one, _ = _with_dropout(jax.random.split(jax.random.key(0), 1), tokens)
    two, _ = _with_dropout(jax.random.split(jax.random.key(1), 1), tokens)
    off, branches = _with_dropout(None, tokens)
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - off).max() > 1e-3
    np.testing.assert_array_equal(branches[:, 0], branches[:, 1])


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
