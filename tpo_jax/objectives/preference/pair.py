"""What preference losses read: token log-probabilities of answers, and the sums of each pair.

Notation: w = chosen, l = rejected, r = log pi(y) - log pi_ref(y) summed over an answer's tokens,
s = f'(pi / pi_ref) the score of r under an f-divergence, Delta = s_w - s_l, n = answer tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
# What TRL's DPOTrainer (1.16) clamps alpha divergences at in float32. exp(80) = 6e34 is finite, and
# a gradient of it. Squares are not, from exp(44) on: a gradient's norm, or `ipo` of such scores.
LARGEST_EXPONENT = 80.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairTokens:
    """The currency: one number per answer token.

    Entries of weight 0 (padding, forced slot tokens) and rows that are not valid may hold anything.

    Attributes:
      policy, reference: float32[B, K, A] log-probabilities, branch 0 chosen, the others rejected.
      weights: float32[B, K, A], 1 for a token that counts. With K > 2, a rejected answer without
        any is one that the row does not have.
      valid: bool[B] or float32[B], 0 for a padding row.
      log_collision: float32[B, K, A], log sum over the vocabulary of pi^2 where the token is drawn
        (WPO's weights); None where no loss asks.
      contrast_policy, contrast_reference: float32[B, A] log-probabilities of the *chosen* answer
        when the model is shown the manipulated frames (mDPO's conditional term); None where no
        loss asks.
      vocabulary_kl: float32[B, K, A], KL(pi_ref || pi) over the vocabulary where the token is
        drawn; None where no loss asks.
    """

    policy: jax.Array
    reference: jax.Array
    weights: jax.Array
    valid: jax.Array
    log_collision: jax.Array | None = None
    contrast_policy: jax.Array | None = None
    contrast_reference: jax.Array | None = None
    vocabulary_kl: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairScores:
    """Sums over the tokens of an answer; every field float32[B], B pairs: K - 1 of each row.

    policy_*, reference_*: log-probabilities, length-desensitised where that is asked.
    *_score: s. *_length: n. *_nll: -log pi(y), and *_drift: r, never length-desensitised.
    chosen_kl: sum over the tokens of y_w of an estimate of KL(pi_ref || pi), see `token_kl`.
    kl: the same over both answers. valid: what a pair counts, 1 / n of the n that a row has, 0 for
    padding.
    contrast_ratio: r of y_w under the manipulated frames, or None.
    wpo: WPO's weight of the pair, or None.
    chosen_vocabulary_kl: sum over the tokens of y_w of KL(pi_ref || pi) over the vocabulary, or
    None. vocabulary_kl: the same over both answers.
    """

    policy_chosen: jax.Array
    policy_rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    chosen_score: jax.Array
    rejected_score: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    chosen_nll: jax.Array
    rejected_nll: jax.Array
    chosen_drift: jax.Array
    rejected_drift: jax.Array
    chosen_kl: jax.Array
    kl: jax.Array
    valid: jax.Array
    contrast_ratio: jax.Array | None = None
    wpo: jax.Array | None = None
    chosen_vocabulary_kl: jax.Array | None = None
    vocabulary_kl: jax.Array | None = None

    @property
    def chosen_ratio(self) -> jax.Array:
        """r_w, float32[B]."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> jax.Array:
        """r_l, float32[B]."""
        return self.policy_rejected - self.reference_rejected

    @property
    def delta(self) -> jax.Array:
        """Delta = s_w - s_l, float32[B]."""
        return self.chosen_score - self.rejected_score

    @property
    def mean_delta(self) -> jax.Array:
        """s_w / n_w - s_l / n_l, float32[B]."""
        chosen = self.chosen_score / jnp.maximum(self.chosen_length, 1)
        return chosen - self.rejected_score / jnp.maximum(self.rejected_length, 1)

    @property
    def chosen_mean(self) -> jax.Array:
        """Mean log-probability of a token of y_w under the policy, float32[B]."""
        return -self.chosen_nll / jnp.maximum(self.chosen_length, 1)

    @property
    def rejected_mean(self) -> jax.Array:
        """Mean log-probability of a token of y_l under the policy, float32[B]."""
        return -self.rejected_nll / jnp.maximum(self.rejected_length, 1)


def every_pair(tokens: PairTokens) -> PairTokens:
    """(chosen, rejected) with each rejected answer of a row: [B, K, A] -> [B * (K - 1), 2, A].

    A pair of a row that has n of them is valid by 1 / n: a row counts once.
    """
    B, K, A = tokens.weights.shape
    if K == 2:
        return tokens

    def paired(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        chosen = jnp.broadcast_to(x[:, :1], (B, K - 1, A))
        return jnp.stack([chosen, x[:, 1:]], axis=2).reshape(B * (K - 1), 2, A)

    def repeated(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.repeat(x, K - 1, axis=0)

    there = (tokens.weights[:, 1:] != 0).any(-1).astype(jnp.float32)
    share = there / jnp.maximum(there.sum(1, keepdims=True), 1)
    return PairTokens(
        policy=paired(tokens.policy),
        reference=paired(tokens.reference),
        weights=paired(tokens.weights),
        valid=(tokens.valid.astype(jnp.float32)[:, None] * share).reshape(-1),
        log_collision=paired(tokens.log_collision),
        contrast_policy=repeated(tokens.contrast_policy),
        contrast_reference=repeated(tokens.contrast_reference),
        vocabulary_kl=paired(tokens.vocabulary_kl),
    )


def pair_scores(
    tokens: PairTokens,
    *,
    ld_alpha: float = 1.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> PairScores:
    """Sums over tokens, of every pair of a row.

    Args:
      ld_alpha: weight of the tokens of the longer answer beyond the length of the shorter one
        (LD-DPO, arXiv 2409.06411), for policy and reference alike and under either frames; 1 counts
        every token fully.
      divergence: one of DIVERGENCES (arXiv 2309.16240), see `divergence_score`.
      divergence_alpha: of "alpha".
    """
    tokens = every_pair(tokens)
    # Cleaned before anything is computed: NaN times a gradient of 0 is NaN.
    valid = tokens.valid.astype(jnp.float32)
    counts = (tokens.weights != 0) & (valid != 0)[:, None, None]

    def clean(values: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, values, 0.0)

    policy, reference = clean(tokens.policy, counts), clean(tokens.reference, counts)
    weights = tokens.weights
    if ld_alpha != 1.0:
        shared = counts.sum(-1).min(-1)[:, None, None]
        weights = weights * jnp.where(jnp.cumsum(counts, axis=-1) <= shared, 1.0, ld_alpha)
    sums = (policy * weights).sum(-1)
    reference_sums = (reference * weights).sum(-1)
    scores = divergence_score(sums - reference_sums, divergence, divergence_alpha)
    length = tokens.weights.sum(-1)
    whole = (policy * tokens.weights).sum(-1)
    drift = whole - (reference * tokens.weights).sum(-1)
    kl = (token_kl(policy, reference) * tokens.weights).sum(-1)
    wpo = contrast = exact = None
    if tokens.log_collision is not None:
        aligned = (policy - clean(tokens.log_collision, counts)) * tokens.weights
        mean = aligned.sum(-1) / jnp.maximum(length, 1)
        wpo = jax.lax.stop_gradient(jnp.exp(mean.sum(-1)))
    if tokens.contrast_policy is not None and tokens.contrast_reference is not None:
        ratio = tokens.contrast_policy - tokens.contrast_reference
        contrast = (clean(ratio, counts[:, 0]) * weights[:, 0]).sum(-1)
    if tokens.vocabulary_kl is not None:
        exact = (clean(tokens.vocabulary_kl, counts) * tokens.weights).sum(-1)
    return PairScores(
        policy_chosen=sums[:, 0],
        policy_rejected=sums[:, 1],
        reference_chosen=reference_sums[:, 0],
        reference_rejected=reference_sums[:, 1],
        chosen_score=scores[:, 0],
        rejected_score=scores[:, 1],
        chosen_length=length[:, 0],
        rejected_length=length[:, 1],
        chosen_nll=-whole[:, 0],
        rejected_nll=-whole[:, 1],
        chosen_drift=drift[:, 0],
        rejected_drift=drift[:, 1],
        chosen_kl=kl[:, 0],
        kl=kl.sum(-1),
        valid=valid,
        contrast_ratio=contrast,
        wpo=wpo,
        chosen_vocabulary_kl=None if exact is None else exact[:, 0],
        vocabulary_kl=None if exact is None else exact.sum(-1),
    )


def divergence_score(ratio: jax.Array, divergence: str, alpha: float = 0.5) -> jax.Array:
    """s = f'(exp r) of r float32[...] (nats), 0 at r = 0.

    reverse_kl: r. forward_kl: 1 - e^-r. js: log 2 + log sigmoid(r).
    alpha: (e^{(a-1) r} - 1) / (a - 1), which is r for a = 1.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return ratio
    if divergence == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-ratio, LARGEST_EXPONENT))
    if divergence == "js":
        return np.log(2) + jax.nn.log_sigmoid(ratio)
    if divergence == "alpha":
        return (jnp.exp(jnp.minimum((alpha - 1) * ratio, LARGEST_EXPONENT)) - 1) / (alpha - 1)
    raise ValueError(
        f"preference.divergence={divergence!r} is unknown; known: {', '.join(DIVERGENCES)}"
    )


def token_kl(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """Estimate of KL(pi_ref || pi) at each token from that token alone.

    It is q - 1 - log q with q = pi / pi_ref (J. Schulman's "k3"): never negative, and unbiased
    where the token was drawn from pi_ref, as the answers are that a model generates for its own
    training. Where both distributions are at hand it is exact: `PairTokens.vocabulary_kl`.

    Args:
      policy, reference: float32[...] log-probabilities of the token.
    """
    ratio = policy - reference
    return jnp.expm1(jnp.minimum(ratio, LARGEST_EXPONENT)) - ratio
