"""Next-token loss on answers."""

import jax
import jax.numpy as jnp

from tpo_jax.parallel.weighted_sum import WeightedSum


def language_loss(logps: jax.Array, weights: jax.Array) -> WeightedSum:
    """Negative log-likelihood, one weight per answer token (a token mean over the global batch).

    Args:
      logps: float32[B, K, A] log-probability of every answer token.
      weights: float32[B, K, A]; 0 for padding and for forced slot tokens.
    """
    return WeightedSum(-(logps * weights).sum(), weights.sum())


def token_accuracy(correct: jax.Array, weights: jax.Array) -> WeightedSum:
    """Share of answer tokens that are the arg-max; `correct` float32[B, K, A] of 0 or 1."""
    return WeightedSum((correct * weights).sum(), weights.sum())


def answer_accuracy(correct: jax.Array, weights: jax.Array) -> WeightedSum:
    """Share of answers that greedy decoding gives word for word: every counted token is the
    arg-max. `correct` float32[B, K, A] of 0 or 1; answers without a weight do not count."""
    counted = weights > 0
    right = jnp.where(counted, correct > 0, True).all(axis=-1)
    answers = counted.any(axis=-1)
    return WeightedSum((right & answers).sum(dtype=jnp.float32), answers.sum(dtype=jnp.float32))
