"""One preference step on a shared prefix is the same step on separate rows, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import LanguageModel
from tpo_jax.models.layers import Rngs
from tpo_jax.models.video_language import branch_keys
from tpo_jax.objectives.logps import token_logps
from tpo_jax.objectives.preference import PairTokens, PreferenceConfig, preference_losses
from tpo_jax.parallel.paths import flatten

CONFIG = LanguageConfig(
    vocab_size=128, width=16, depth=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, qkv_bias=True
)
B, P, K, R = 3, 8, 3, 6
LOSSES = PreferenceConfig(beta=0.3, loss="sigmoid", sft=0.5)
# case -> segments of the prefixes [B, P] and of the branches [B, K, R]; 0 is padding: inside a
# prefix (a frame that is not there), behind it, a rejected answer that is not there, a whole row.
PLAIN = np.ones((B, P), np.int32), np.ones((B, K, R), np.int32)
PADDED = (
    np.array([[1] * 6 + [0] * 2, [1, 1, 0, 0, 1, 1, 0, 0], [0] * 8], np.int32),
    np.array(
        [
            [[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]],
            [[1] * 2 + [0] * 4, [1] * 5 + [0], [0] * 6],
            [[0] * 6] * 3,
        ],
        np.int32,
    ),
)
PACKED = (
    np.array([[1] * 4 + [2] * 3 + [0], [1] * 2 + [2] * 6, [1] * 5 + [2] * 3], np.int32),
    np.array(
        [
            [[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2]],
            [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 2, 0]],
            [[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0]],
        ],
        np.int32,
    ),
)
CASES = {"plain": PLAIN, "padded": PADDED, "packed": PACKED, "dropout": PADDED}


def _runs(*lengths):
    """int32[n]: so many entries of segment 1, then of 2, then of padding."""
    return np.repeat(np.array([1, 2, 0], np.int32), lengths)


# Prefix, branch and both together take several of the kernel's blocks of 128, none of them whole,
# and a segment of the prefix ends in one block and a branch's in another.
LONG = (
    np.stack([_runs(90, 95, 15)]),
    np.stack([[_runs(70, 60, 10), _runs(5, 131, 4), _runs(130, 10, 0)]]),
)


def _tokens(segments, own):
    """int32[B, P], int32[B, K, R]."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 128, part.shape).astype(np.int32) for part in (segments, own))


def _model(backend, window=None):
    config = dataclasses.replace(CONFIG, attention=backend, dropout=0.2, sliding_window=window)
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=Rngs(0))))


def _weights():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), _model("dense")[1]
    )


def _loss(logps, tokens, weights):
    """The loss of float32[pairs, K, A]; each token has a reference of its own in any layout."""
    valid = weights.any((1, 2))
    pairs = PairTokens(logps, -2 - tokens / 20, weights.astype(jnp.float32), valid)
    terms = preference_losses(pairs, LOSSES)
    return sum(weight * terms[name].mean() for name, weight in LOSSES.weights.items())


def _step(backend, window=None):
    """Function of (weights, rows, keys) -> (loss, gradient) of the layout of training.

    rows: prefix (tokens, positions, segments), branches likewise, and bool[2 B, K, R - 1], the
    tokens behind a branch's first that are answers of segment 1, and of 2, of each row.
    """
    structure, _ = _model(backend, window)

    def loss(state, prefix, branches, answers, keys):
        model = nnx.merge(structure, state)
        embedded = ((model.embed_tokens(tokens), *rest) for tokens, *rest in (prefix, branches))
        _, hidden = model(*embedded, keys)
        targets = branches[0][..., 1:]
        logps = token_logps(hidden[..., :-1, :], model.table, targets, chunk=4)
        # [B, K, R - 1] also where every branch has a row of its own, [2 B, K, R - 1] a segment.
        shape = (-1, *answers.shape[1:])
        of_pairs = [jnp.repeat(x.reshape(shape), 2, axis=0) for x in (logps, targets)]
        return _loss(*of_pairs, answers)

    return jax.jit(jax.value_and_grad(loss))


def _positions(segments):
    """0, 1, ... within each segment; of int32[n]."""
    out = np.zeros_like(segments)
    for segment in (1, 2):
        out[segments == segment] = np.arange((segments == segment).sum())
    return out


def _shared_rows(segments, own):
    B, K, R = own.shape
    prefix, branches = _tokens(segments, own)
    positions = np.stack([_positions(row) for row in segments])
    lengths = np.stack([[0, *((row == s).sum() for s in (1, 2))] for row in segments])
    own_positions = np.array(
        [[_positions(row) + lengths[b][row] for row in own[b]] for b in range(B)]
    )
    # A segment's first token is given, the others are answered.
    answers = np.stack(
        [(own[..., 1:] == s) & (own[..., :-1] == s) for s in (1, 2)], axis=1
    ).reshape(2 * B, K, R - 1)
    return (prefix, positions, segments), (branches, own_positions, own), answers


@functools.partial(jax.jit, static_argnums=4)
@jax.value_and_grad
def _separate(state, tokens, segments, answers, window=None):
    """Plain causal rows without branches: int32[2 B, K, T] each, answers bool[2 B, K, T - 1]."""
    model = nnx.merge(_model("dense", window)[0], state)
    rows = tokens.reshape(-1, tokens.shape[-1])
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden, _ = model.prefill(model.embed_tokens(rows), positions, segments.reshape(rows.shape))
    logps = token_logps(hidden[:, :-1], model.table, rows[:, 1:], chunk=4)
    return _loss(logps.reshape(answers.shape), tokens[..., 1:], answers)


def _separate_rows(segments, own):
    """Each (pair, branch) alone: its prefix, its branch, then padding, which nothing sees."""
    P, (B, K, R) = segments.shape[1], own.shape
    prefix, branches = _tokens(segments, own)
    tokens, used, answers = (np.zeros((B, 2, K, P + R), np.int32) for _ in range(3))
    for b, s, k in np.ndindex(B, 2, K):
        start = prefix[b][segments[b] == s + 1]
        row = np.r_[start, branches[b, k][own[b, k] == s + 1]]
        tokens[b, s, k, : len(row)], used[b, s, k, : len(row)] = row, 1
        answers[b, s, k, len(start) + 1 : len(row)] = 1
    tokens, used, answers = (x.reshape(2 * B, K, P + R) for x in (tokens, used, answers))
    return tokens, used, answers[..., 1:] > 0


def _one_branch(rows, keys):
    """The arguments of a step in which every branch has a row of its own, with the same keys."""
    prefix, branches, answers = rows
    prefix = tuple(np.repeat(x, K, axis=0) for x in prefix)
    branches = tuple(x.reshape(B * K, 1, R) for x in branches)
    return prefix, branches, answers, (jnp.repeat(keys[0], K), keys[1].reshape(B * K, 1))


def _leaves(gradient):
    return flatten(nnx.to_pure_dict(gradient))


@pytest.fixture(scope="module")
def steps():
    # Compiling takes longer than running.
    jax.config.update("jax_disable_most_optimizations", True)
    yield {backend: _step(backend) for backend in ("xla", "splash_interpret", "dense")}
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_separate_rows(steps, backend, case):
    weights, rows, keys = _weights(), _shared_rows(*CASES[case]), None
    if case == "dropout":
        # Rows of one branch have the same masks: the row's key, and slice k of the branches'.
        keys = jax.random.split(jax.random.key(3), B)
        keys = keys, branch_keys(keys, K)
        want, wanted = steps["dense"](weights, *_one_branch(rows, keys))
        _, kept = _separate(weights, *_separate_rows(*CASES[case]))
        moved = _leaves(wanted)["embed/table"] - _leaves(kept)["embed/table"]
        share = jnp.abs(moved).max() / jnp.abs(_leaves(kept)["embed/table"]).max()
        assert share > 0.05, "nothing is dropped"
    else:
        want, wanted = _separate(weights, *_separate_rows(*CASES[case]))
    _check(steps[backend](weights, *rows, keys), (want, wanted))


def _check(got, want):
    """To 1e-5: of the loss, and of the largest entry of each parameter's gradient."""
    (got, gradient), (want, wanted) = got, want
    np.testing.assert_allclose(got, want, rtol=1e-5)
    leaves = _leaves(gradient)
    for path, leaf in _leaves(wanted).items():
        largest = float(jnp.abs(leaf).max())
        assert largest > 1e-4, path
        np.testing.assert_allclose(
            leaves[path], leaf, rtol=0, atol=1e-5 * largest, err_msg=path
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
@pytest.mark.parametrize("case", ["padded", "packed"])
def test_a_window_counts_the_tokens_of_a_row_alone(steps, backend, case):
    """Three tokens back, behind padding, frames that are not there, and other packed rows."""
    want = _separate(_weights(), *_separate_rows(*CASES[case]), 3)
    whole, _ = _separate(_weights(), *_separate_rows(*CASES[case]))
    assert abs(whole - want[0]) > 1e-3 * abs(whole), "the window hides nothing"
    _check(_step(backend, 3)(_weights(), *_shared_rows(*CASES[case]), None), want)


def test_loss_and_gradient_of_splash_over_several_of_its_blocks(steps):
    want = _separate(_weights(), *_separate_rows(*LONG))
    _check(steps["splash_interpret"](_weights(), *_shared_rows(*LONG), None), want)
