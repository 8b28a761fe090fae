"""Preference losses: pure functions of per-token log-probabilities of two answers.

Notation: w = chosen, l = rejected, log-probabilities are summed over an answer's tokens,
r = log pi(y) - log pi_ref(y), Delta = r_w - r_l, n = number of answer tokens.

Formulas: DPO (arXiv 2305.18290, `sigmoid`), cDPO (label noise, same authors' note), robust DPO
(2403.00409), SLiC-style `hinge` (2309.06657), IPO (2310.12036, token means), APO-zero (2408.06266).
Temporal Preference Optimization (2501.13919) is {sigmoid: 1, sft: alpha}.

A new loss is one function and one entry in `PREFERENCE_LOSSES`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from tpo_jax.parallel.weighted_sum import WeightedSum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairScores:
    """What the losses read; every field float32[B].

    policy_*, reference_*: summed log-probabilities of the chosen and the rejected answer.
    *_length: number of answer tokens. valid: 1 for a pair, 0 for a padding row.
    """

    policy_chosen: jax.Array
    policy_rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    valid: jax.Array

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
        """Delta, float32[B]."""
        return self.chosen_ratio - self.rejected_ratio


def pair_scores(
    logps: jax.Array, reference_logps: jax.Array, weights: jax.Array, valid: jax.Array
) -> PairScores:
    """Sums token log-probabilities.

    Args:
      logps, reference_logps, weights: float32[B, 2, A], branch 0 chosen, branch 1 rejected. Tokens
        of weight 0 (padding, forced slot tokens) do not count.
      valid: bool[B].
    """
    policy = (logps * weights).sum(-1)
    reference = (reference_logps * weights).sum(-1)
    length = weights.sum(-1)
    return PairScores(
        policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], length[:, 0], length[:, 1],
        valid.astype(jnp.float32),
    )  # fmt: skip


def _sigmoid(pair: PairScores, beta: float) -> jax.Array:
    return -jax.nn.log_sigmoid(beta * pair.delta)


def _cdpo(pair: PairScores, beta: float, label_smoothing: float) -> jax.Array:
    kept, flipped = jax.nn.log_sigmoid(beta * pair.delta), jax.nn.log_sigmoid(-beta * pair.delta)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def _robust(pair: PairScores, beta: float, label_smoothing: float) -> jax.Array:
    kept, flipped = jax.nn.log_sigmoid(beta * pair.delta), jax.nn.log_sigmoid(-beta * pair.delta)
    noise = label_smoothing
    return (-(1 - noise) * kept + noise * flipped) / (1 - 2 * noise)


def _hinge(pair: PairScores, beta: float) -> jax.Array:
    return jax.nn.relu(1 - beta * pair.delta)


def _mean_delta(pair: PairScores) -> jax.Array:
    chosen = pair.chosen_ratio / jnp.maximum(pair.chosen_length, 1)
    return chosen - pair.rejected_ratio / jnp.maximum(pair.rejected_length, 1)


def _ipo(pair: PairScores, beta: float) -> jax.Array:
    return (_mean_delta(pair) - 1 / (2 * beta)) ** 2


def _sigmoid_norm(pair: PairScores, beta: float) -> jax.Array:
    return -jax.nn.log_sigmoid(beta * _mean_delta(pair))


def _apo_zero(pair: PairScores, beta: float) -> jax.Array:
    chosen, rejected = beta * pair.chosen_ratio, beta * pair.rejected_ratio
    return 1 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)


def _sft(pair: PairScores) -> WeightedSum:
    total = -(pair.policy_chosen * pair.valid).sum()
    return WeightedSum(total, (pair.chosen_length * pair.valid).sum())


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A registered loss.

    function: (PairScores, *needs) -> float32[B] per pair, or a WeightedSum where the mean is not
      over pairs (sft: a token mean over the global batch).
    needs: options that the function takes by keyword, of `PreferenceConfig`.
    reference: whether it reads reference log-probabilities; if none of the losses in use does, a
      batch without `reference_logps` is accepted.
    """

    function: Callable[..., jax.Array | WeightedSum]
    needs: tuple[str, ...] = ("beta",)
    reference: bool = True


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(_sigmoid),
    "cdpo": PreferenceLoss(_cdpo, needs=("beta", "label_smoothing")),
    "robust": PreferenceLoss(_robust, needs=("beta", "label_smoothing")),
    "hinge": PreferenceLoss(_hinge),
    "ipo": PreferenceLoss(_ipo),
    "sigmoid_norm": PreferenceLoss(_sigmoid_norm),
    "apo_zero": PreferenceLoss(_apo_zero),
    "sft": PreferenceLoss(_sft, needs=(), reference=False),
}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """config.preference: total = loss + sft * (token mean of -log pi(chosen)).

    Attributes:
      beta: strength of the tie to the reference (0.3 LongVA-TPO, 0.2 LLaVA-Video-TPO).
      loss: a name in PREFERENCE_LOSSES, or {name: weight} for a sum of several.
      sft: weight alpha of the sft term; 0 reports it without training on it.
      label_smoothing: assumed share of wrong labels, for cdpo and robust only.
    """

    beta: float
    loss: str | Mapping[str, float] = "sigmoid"
    sft: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in PREFERENCE_LOSSES:
                raise ValueError(
                    f"preference.loss={name!r} is unknown; known: {', '.join(PREFERENCE_LOSSES)}"
                )
        if self.beta <= 0:
            raise ValueError(f"preference.beta={self.beta}: must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing}: must be in [0, 0.5); half or "
                "more of the labels wrong means that chosen and rejected are exchanged"
            )
        smooth = any("label_smoothing" in PREFERENCE_LOSSES[n].needs for n in self.weights)
        if self.label_smoothing and not smooth:
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing} has no effect on "
                f"{self.loss!r}; use loss 'cdpo' or 'robust', or set it to 0"
            )

    @property
    def weights(self) -> dict[str, float]:
        """{loss name: weight}, sft included."""
        losses = {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)
        return losses | {"sft": self.sft}

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCE_LOSSES[name].reference for name in self.weights)


def preference_losses(pair: PairScores, config: PreferenceConfig) -> dict[str, WeightedSum]:
    """One WeightedSum per loss in `config.weights` (unweighted)."""
    terms = {}
    for name in config.weights:
        loss = PREFERENCE_LOSSES[name]
        value = loss.function(pair, **{option: getattr(config, option) for option in loss.needs})
        if not isinstance(value, WeightedSum):
            value = WeightedSum((value * pair.valid).sum(), pair.valid.sum())
        terms[name] = value
    return terms


def preference_metrics(pair: PairScores, beta: float) -> dict[str, WeightedSum]:
    """Means over pairs.

    reward_chosen, reward_rejected: beta * r. margin: beta * Delta. accuracy: share with Delta > 0
    (a tie counts one half). chosen_drift: r_w in nats a pair, below 0 when the chosen answer loses
    likelihood (likelihood displacement). likelihood_accuracy: share where the policy alone gives
    the chosen answer a higher mean log-probability per token.
    """

    def mean(value: jax.Array) -> WeightedSum:
        return WeightedSum((value * pair.valid).sum(), pair.valid.sum())

    chosen_mean = pair.policy_chosen / jnp.maximum(pair.chosen_length, 1)
    rejected_mean = pair.policy_rejected / jnp.maximum(pair.rejected_length, 1)
    return {
        "reward_chosen": mean(beta * pair.chosen_ratio),
        "reward_rejected": mean(beta * pair.rejected_ratio),
        "margin": mean(beta * pair.delta),
        "accuracy": mean((jnp.sign(pair.delta) + 1) / 2),
        "chosen_drift": mean(pair.chosen_ratio),
        "likelihood_accuracy": mean((jnp.sign(chosen_mean - rejected_mean) + 1) / 2),
    }
