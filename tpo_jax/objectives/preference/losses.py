"""The formulas: functions of `PairScores` that return float32[B] a pair, or a WeightedSum.

Notation as in `pair`; sigma is the logistic function, e the label smoothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.objectives.preference.pair import PairScores
from tpo_jax.parallel.weighted_sum import WeightedSum

# --- on the difference of the two scores ---


def sigmoid(pair: PairScores, beta: float) -> jax.Array:
    """DPO, arXiv 2305.18290: -log sigma(beta Delta)."""
    return -jax.nn.log_sigmoid(beta * pair.delta)


def cdpo(pair: PairScores, beta: float, label_smoothing: float) -> jax.Array:
    """Conservative DPO (Mitchell 2023, note by an author of DPO), for noisy labels:
    -(1-e) log sigma(beta Delta) - e log sigma(-beta Delta)."""
    return smoothed(beta * pair.delta, label_smoothing)


def smoothed(logit: jax.Array, label_smoothing: float) -> jax.Array:
    """-(1-e) log sigma(x) - e log sigma(-x), of x float32[B]."""
    kept, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def robust(pair: PairScores, beta: float, label_smoothing: float) -> jax.Array:
    """Robust DPO, 2403.00409: (-(1-e) log sigma(beta Delta) + e log sigma(-beta Delta)) / (1-2e).

    May be negative.
    """
    kept, flipped = jax.nn.log_sigmoid(beta * pair.delta), jax.nn.log_sigmoid(-beta * pair.delta)
    noise = label_smoothing
    return (-(1 - noise) * kept + noise * flipped) / (1 - 2 * noise)


def hinge(pair: PairScores, beta: float) -> jax.Array:
    """SLiC's hinge on DPO's logit, 2309.06657: max(0, 1 - beta Delta)."""
    return jax.nn.relu(1 - beta * pair.delta)


def exo_pair(pair: PairScores, beta: float, label_smoothing: float) -> jax.Array:
    """EXO for two answers, 2402.00856 eq. 16: KL((q, 1-q) || (1-e, e)), q = sigma(beta Delta)."""
    logit = beta * pair.delta
    kept, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    chosen = jax.nn.sigmoid(logit) * (kept - np.log1p(-label_smoothing))
    return chosen + jax.nn.sigmoid(-logit) * (flipped - np.log(label_smoothing))


def discopop(pair: PairScores, beta: float, discopop_tau: float) -> jax.Array:
    """DiscoPOP, 2406.08414 eq. 5, x = beta Delta, m = sigma(x / tau):
    (1-m) (-log sigma(x)) + m e^-x."""
    logit = beta * pair.delta
    share = jax.nn.sigmoid(logit / discopop_tau)
    # m e^-x with both factors in one exponent: e^-x alone overflows where m is 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(logit / discopop_tau) - logit)
    return -jax.nn.log_sigmoid(logit) * (1 - share) + exponential


def rpo(pair: PairScores, beta: float, rpo_alpha: float) -> jax.Array:
    """Iterative RPO, 2404.19733: -log sigma(beta Delta) + alpha (-log pi(y_w)) / n_w, a pair."""
    return sigmoid(pair, beta) + rpo_alpha * pair.chosen_nll / jnp.maximum(pair.chosen_length, 1)


# --- on token means ---


def ipo(pair: PairScores, beta: float) -> jax.Array:
    """IPO, 2310.12036, on token means: (s_w / n_w - s_l / n_l - 1 / (2 beta))^2."""
    return (pair.mean_delta - 1 / (2 * beta)) ** 2


def sigmoid_norm(pair: PairScores, beta: float) -> jax.Array:
    """Length-normalised DPO, 2411.15124: -log sigma(beta (s_w / n_w - s_l / n_l))."""
    return -jax.nn.log_sigmoid(beta * pair.mean_delta)


# --- on each answer's ratio to the reference ---


def nca_pair(pair: PairScores, beta: float) -> jax.Array:
    """NCA for two answers, 2402.05369: -log s(b r_w) - log s(-b r_w) / 2 - log s(-b r_l) / 2."""
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(pair: PairScores, beta: float) -> jax.Array:
    """Binary classifier, 2404.04656, with shift 0: -log sigma(beta r_w) - log sigma(-beta r_l)."""
    return -jax.nn.log_sigmoid(beta * pair.chosen_ratio) - jax.nn.log_sigmoid(
        -beta * pair.rejected_ratio
    )


def sppo_hard(pair: PairScores, beta: float) -> jax.Array:
    """SPPO, 2405.00675 eq. 4.7 with P = 1: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2."""
    return (pair.chosen_ratio - 0.5 / beta) ** 2 + (pair.rejected_ratio + 0.5 / beta) ** 2


def apo_zero(pair: PairScores, beta: float) -> jax.Array:
    """APO-zero, 2408.06266 eq. 7, for chosen answers better than the model's own:
    1 - sigma(beta r_w) + sigma(beta r_l)."""
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    return 1 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)


def apo_down(pair: PairScores, beta: float) -> jax.Array:
    """APO-down, 2408.06266 eq. 8, for chosen answers worse than the model's own:
    sigma(beta r_w) + 1 - sigma(beta (r_w - r_l))."""
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    return jax.nn.sigmoid(chosen) + 1 - jax.nn.sigmoid(chosen - rejected)


# --- without a reference ---


def simpo(pair: PairScores, beta: float, simpo_gamma: float) -> jax.Array:
    """SimPO, 2405.14734: -log sigma(beta (log pi(y_w)/n_w - log pi(y_l)/n_l) - gamma)."""
    return -jax.nn.log_sigmoid(beta * (pair.chosen_mean - pair.rejected_mean) - simpo_gamma)


def orpo(pair: PairScores) -> jax.Array:
    """ORPO's odds ratio term, 2403.07691: -log sigma(log odds(y_w) - log odds(y_l)).

    odds = p / (1 - p), p = exp(log pi(y) / n). The paper's loss is {orpo: lambda, sft: 1}.
    """
    return -jax.nn.log_sigmoid(_log_odds(pair.chosen_mean) - _log_odds(pair.rejected_mean))


def _log_odds(mean: jax.Array) -> jax.Array:
    """log p - log(1 - p) of p = exp(mean); kept off p = 1, where it is infinite."""
    mean = jnp.minimum(mean, -1e-6)
    return mean - jnp.log(-jnp.expm1(mean))


def sft(pair: PairScores) -> WeightedSum:
    """-log pi of a chosen token: the mean over all tokens of the global batch."""
    total = (pair.chosen_nll * pair.valid).sum()
    return WeightedSum(total, (pair.chosen_length * pair.valid).sum())


# --- against manipulated frames, and ties to the reference ---


def conditional(pair: PairScores, beta: float) -> jax.Array:
    """mDPO's conditional preference, 2406.11839: -log sigma(beta (r_w(v) - r_w(v'))).

    v' are the manipulated frames that produced the rejected answer. With `sigmoid` it is Re-Align's
    rDPO (2502.13146), whose v' is a retrieved image; with `anchor` as well it is mDPO.
    """
    assert pair.contrast_ratio is not None
    return -jax.nn.log_sigmoid(beta * (pair.chosen_ratio - pair.contrast_ratio))


def anchor(pair: PairScores, beta: float) -> jax.Array:
    """mDPO's anchored preference, 2406.11839, anchor 0: -log sigma(beta r_w)."""
    return -jax.nn.log_sigmoid(beta * pair.chosen_ratio)


def chosen_kl(pair: PairScores) -> jax.Array:
    """`vocabulary_kl`, estimated from the tokens themselves (`pair.token_kl`)."""
    return pair.chosen_kl


def vocabulary_kl(pair: PairScores) -> jax.Array:
    """RRPO's token-wise tie to the reference, 2504.12083: sum over the tokens of y_w of
    KL(pi_ref || pi), which at each of them is a sum over the vocabulary."""
    assert pair.chosen_vocabulary_kl is not None
    return pair.chosen_vocabulary_kl


# --- coupled over the batch ---


def aot(pair: PairScores, beta: float, label_smoothing: float) -> WeightedSum:
    """Alignment by optimal transport, paired, 2406.05882.

    The policy's log pi(y_w) - log pi(y_l) and the reference's are sorted over the global batch;
    their differences, rank by rank, go through a smoothed -log sigma(beta d).
    """
    policy = pair.policy_chosen - pair.policy_rejected
    reference = pair.reference_chosen - pair.reference_rejected
    return _by_rank(policy, reference, pair.valid, beta, label_smoothing)


def aot_unpaired(pair: PairScores, beta: float, label_smoothing: float) -> WeightedSum:
    """AOT without pairing, 2406.05882: as `aot`, with r_w and r_l sorted over the batch."""
    return _by_rank(pair.chosen_ratio, pair.rejected_ratio, pair.valid, beta, label_smoothing)


def _by_rank(
    high: jax.Array, low: jax.Array, valid: jax.Array, beta: float, label_smoothing: float
) -> WeightedSum:
    """Rows that are not valid sort to the end of both, where they are left out."""

    def ordered(values: jax.Array) -> jax.Array:
        return jnp.sort(jnp.where(valid != 0, values, jnp.inf))

    kept = jnp.arange(valid.shape[0]) < (valid != 0).sum()
    difference = jnp.where(kept, ordered(high), 0.0) - jnp.where(kept, ordered(low), 0.0)
    return WeightedSum.of(smoothed(beta * difference, label_smoothing), kept)


def kto_pair(pair: PairScores, beta: float) -> jax.Array:
    """KTO on pairs, 2402.01306, the mean of an answer's loss:
    (1 - sigma(beta (r_w - KL_l))) / 2 + (1 - sigma(beta (KL_w - r_l))) / 2.

    KL_w = max(mean of r_w over the global batch, 0), KL_l likewise of r_l; without a gradient.
    """
    chosen_kl, rejected_kl = (
        jax.lax.stop_gradient(jnp.maximum(WeightedSum.of(ratio, pair.valid).mean(), 0))
        for ratio in (pair.chosen_ratio, pair.rejected_ratio)
    )
    chosen = 1 - jax.nn.sigmoid(beta * (pair.chosen_ratio - rejected_kl))
    return 0.5 * (chosen + 1 - jax.nn.sigmoid(beta * (chosen_kl - pair.rejected_ratio)))


def bco(pair: PairScores, beta: float) -> jax.Array:
    """BCO, 2404.04656: -log sigma(beta r_w - d) - log sigma(-(beta r_l - d)).

    d is the mean reward of all answers of the global batch, without a gradient. (The paper keeps a
    running mean over batches; a step here knows its own batch only.)
    """
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    shift = jax.lax.stop_gradient(WeightedSum.of((chosen + rejected) / 2, pair.valid).mean())
    return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)
