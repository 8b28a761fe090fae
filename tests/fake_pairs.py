"""The four pairs of the published golden values, as tokens, and random ones."""

import jax.numpy as jnp
import numpy as np

from tpo_jax.objectives.preference import PairTokens

POLICY = np.array([[-12, -30.5, -8.25, -45], [-14.0, -28, -9, -60]]).T
REFERENCE = np.array([[-13, -31, -8, -50], [-13.5, -29.5, -8.5, -58]]).T
LENGTHS = np.array([[10, 25, 6, 40], [12, 20, 7, 64]]).T


def golden_pairs(rows=slice(None)) -> PairTokens:
    """Each answer's log-probability, unevenly spread over its tokens; padding holds NaN."""
    shares = np.random.default_rng(0).uniform(0.2, 1.0, (4, 2, 64))
    weights = (np.arange(64) < LENGTHS[:, :, None]).astype(np.float32)
    shares = shares * weights / (shares * weights).sum(-1, keepdims=True)

    def spread(sums):
        tokens = np.where(weights > 0, sums[:, :, None] * shares, np.nan)
        return jnp.asarray(tokens[rows], jnp.float32)

    return PairTokens(
        policy=spread(POLICY), reference=spread(REFERENCE), weights=jnp.asarray(weights[rows]),
        valid=jnp.ones(len(weights[rows])),
    )  # fmt: skip


def random_pairs(rows=8, answers=7, seed=0, invalid=(2,)) -> PairTokens:
    """Pairs with every optional array; some rows are padding and hold NaN."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        tokens = -rng.uniform(0.01, 3, shape).astype(np.float32)
        tokens[list(invalid)] = np.nan
        return jnp.asarray(tokens)

    lengths = rng.integers(1, answers + 1, (rows, 2, 1))
    valid = np.ones(rows, np.float32)
    valid[list(invalid)] = 0
    return PairTokens(
        policy=draw(rows, 2, answers), reference=draw(rows, 2, answers),
        weights=jnp.asarray(np.arange(answers) < lengths, jnp.float32), valid=jnp.asarray(valid),
        log_collision=draw(rows, 2, answers), contrast_policy=draw(rows, answers),
        contrast_reference=draw(rows, answers), vocabulary_kl=-draw(rows, 2, answers),
    )  # fmt: skip
