"""Log-probabilities of given tokens, and KL divergences where they are drawn, in chunks:
[tokens, vocabulary] never exists as a whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpo_jax.parallel.mesh import row_devices
from tpo_jax.parallel.rules import constrain_rows

MASKED_LOGIT = -1e30  # finite, so that 0 * logit stays 0 in gradients


class TokenScores(NamedTuple):
    """What is known of the distribution at a target; every field float32[...].

    logp: of the target. correct: 1 where no token scores higher. log_collision: log of the sum over
    the vocabulary of p^2 (the chance that two draws agree), None where it was not asked for.
    reference_logp, kl: where a reference is given, its log-probability of the target, and
    KL(reference || model) in nats, the sum over the vocabulary; else None.
    """

    logp: jax.Array
    correct: jax.Array
    log_collision: jax.Array | None = None
    reference_logp: jax.Array | None = None
    kl: jax.Array | None = None


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """Hidden states where an answer token is predicted.

    Args:
      hidden: float[..., R, D].
      positions: int32[..., A], indices into R.

    Returns:
      float[..., A, D]
    """
    return jnp.take_along_axis(hidden, positions[..., None], axis=-2)


def token_scores(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    vocab_size: int | None = None,
    chunk: int = 512,
    collision: bool = False,
    reference: tuple[jax.Array, jax.Array] | None = None,
) -> TokenScores:
    """log softmax(hidden @ table.T)[target], `chunk` positions of a device at a time.

    Peak memory is chunk x V float32 (forward and backward: the chunk is recomputed), whatever the
    number of positions. Products take the dtype of `hidden` and accumulate in float32. Rows stay
    the leading, sharded dimension: chunks are cut along the positions of each row.

    Chunks are as few as that allows: each of them reads the table, and adds to a gradient of its
    size. Several devices hold a chunk each at a time.

    Args:
      hidden: float[B, ..., D] final hidden states that predict `targets`.
      table: float[V, D] output embedding, rows beyond `vocab_size` are padding.
      targets: int32[B, ...]; every value must be below `vocab_size` (not checked under jit).
      vocab_size: number of real tokens; the padded rows get probability 0. Default: all V rows.
      chunk: positions a chunk, over the rows of one device; at least one per row. With a reference
        half of them, for there are logits of two models.
      collision: whether `log_collision` is computed.
      reference: hidden and table, as above, of the model that `kl` is measured from.

    Returns:
      TokenScores of float32[B, ...]; only `logp` and `kl` carry a gradient, none to the reference.
    """
    vocab_size = table.shape[0] if vocab_size is None else vocab_size
    if not 0 < vocab_size <= table.shape[0]:
        raise ValueError(f"vocab_size {vocab_size} is outside 1..{table.shape[0]} (table rows)")
    rows, positions = targets.shape[0], targets[0].size
    rows_here = -(-rows // row_devices())
    models = 1 if reference is None else 2
    length = min(max(chunk // (models * rows_here), 1), positions)
    count = -(-positions // length)
    pad = count * length - positions

    def cut(x: jax.Array, width: tuple[int, ...]) -> jax.Array:  # -> [count, B, length, ...]
        x = jnp.pad(x.reshape(rows, positions, *width), ((0, 0), (0, pad)) + ((0, 0),) * len(width))
        return jnp.moveaxis(x.reshape(rows, count, length, *width), 1, 0)

    score = jax.checkpoint(
        functools.partial(_score_chunk, vocab_size=vocab_size, collision=collision)
    )
    chunks = [cut(hidden, hidden.shape[-1:]), cut(targets, ())]
    fixed_table = None
    if reference is not None:
        fixed_hidden, fixed_table = jax.lax.stop_gradient(reference)
        chunks.append(cut(fixed_hidden, fixed_hidden.shape[-1:]))
    _, scores = jax.lax.scan(
        lambda carry, x: (carry, score(table, fixed_table, *x)), None, tuple(chunks)
    )

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :positions].reshape(targets.shape)

    return jax.tree.map(join, scores)


def token_logps(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    vocab_size: int | None = None,
    chunk: int = 512,
) -> jax.Array:
    """float32[B, ...] log-probabilities of `targets`; see `token_scores`."""
    return token_scores(hidden, table, targets, vocab_size=vocab_size, chunk=chunk).logp


def _score_chunk(
    table: jax.Array,
    fixed_table: jax.Array | None,
    hidden: jax.Array,
    targets: jax.Array,
    fixed_hidden: jax.Array | None = None,
    *,
    vocab_size: int,
    collision: bool,
) -> TokenScores:
    """TokenScores of float32[B, T].

    Args:
      table, fixed_table: float[V, D] of the model and of the reference, or None.
      hidden, fixed_hidden: float[B, T, D] likewise.
      targets: int32[B, T].
    """
    logits = _logits(hidden, table, vocab_size)
    # A masked sum instead of a gather: it splits over a sharded vocabulary without moving logits.
    chosen = jnp.arange(table.shape[0]) == targets[..., None]
    target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    correct = jax.lax.stop_gradient(target >= jnp.max(logits, axis=-1))
    mass = jax.nn.logsumexp(logits, axis=-1)
    log_collision = None
    if collision:
        fixed = jax.lax.stop_gradient((logits, mass))
        log_collision = jax.nn.logsumexp(2 * fixed[0], axis=-1) - 2 * fixed[1]
    reference_logp = kl = None
    if fixed_hidden is not None and fixed_table is not None:
        fixed_logps = jax.nn.log_softmax(_logits(fixed_hidden, fixed_table, vocab_size))
        reference_logp = jnp.sum(jnp.where(chosen, fixed_logps, 0.0), axis=-1)
        # Padded rows of the table: 0 times the difference of two equal numbers.
        kl = jnp.sum(jnp.exp(fixed_logps) * (fixed_logps - (logits - mass[..., None])), axis=-1)
    return TokenScores(
        target - mass, correct.astype(jnp.float32), log_collision, reference_logp, kl
    )


def _logits(hidden: jax.Array, table: jax.Array, vocab_size: int) -> jax.Array:
    """float[B, T, D], float[V, D] -> float32[B, T, V], MASKED_LOGIT from vocab_size on."""
    # Rows stay where they are and the table comes to them; the compiler may want it otherwise.
    logits = constrain_rows(jnp.einsum(
        "btd,vd->btv", constrain_rows(hidden), table.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    ))  # fmt: skip
    if vocab_size == table.shape[0]:
        return logits
    return jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, MASKED_LOGIT)
