"""What is reported of preference training: rewards, margins, drift and lengths of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.objectives.preference.pair import PairScores
from tpo_jax.parallel.weighted_sum import WeightedSum

# name -> [from, to) seconds, the bins in which the temporal preference data set is published.
DURATION_BINS = {
    "under_1_min": (0.0, 60.0),
    "1_to_3_min": (60.0, 180.0),
    "3_to_10_min": (180.0, 600.0),
    "over_10_min": (600.0, float("inf")),
}

# What is reported of each group of pairs.
GROUPED = (
    "margin", "accuracy", "reward_chosen", "reward_rejected", "chosen_drift", "kl_per_token",
    "chosen_length", "rejected_length",
)  # fmt: skip


def preference_metrics(
    pair: PairScores, beta: float, *, reference: bool = True
) -> dict[str, WeightedSum]:
    """Means over pairs (of rows, of which each counts its mean), except for *kl_per_token.

    reward_chosen, reward_rejected: beta * r, length-desensitised where the losses are. margin:
    beta * (r_w - r_l). accuracy: share with a margin above 0 (a tie counts one half). chosen_drift,
    rejected_drift: r of the whole answer in nats, below 0 when it loses likelihood (chosen:
    likelihood displacement). kl_per_token: `pair.token_kl` over the tokens of both answers.
    vocabulary_kl_per_token: what that estimates, where a loss reads it. likelihood_accuracy: share
    where the policy alone gives the chosen answer a higher mean log-probability per token, of all
    its tokens. chosen_length, rejected_length: tokens.
    contrast_margin, contrast_accuracy: as margin and accuracy, of the chosen answer under right
    against manipulated frames, where these were scored.

    Args:
      reference: whether the reference log-probabilities mean anything.
    """

    def mean(value: jax.Array) -> WeightedSum:
        return WeightedSum.of(value, pair.valid)

    metrics = {
        "likelihood_accuracy": mean(_wins(pair.chosen_mean - pair.rejected_mean)),
        "chosen_length": mean(pair.chosen_length),
        "rejected_length": mean(pair.rejected_length),
    }
    if not reference:
        return metrics
    difference = pair.chosen_ratio - pair.rejected_ratio
    lengths = WeightedSum.of(pair.chosen_length + pair.rejected_length, pair.valid).total

    def per_token(kl: jax.Array) -> WeightedSum:
        return WeightedSum(WeightedSum.of(kl, pair.valid).total, lengths)

    metrics |= {
        "reward_chosen": mean(beta * pair.chosen_ratio),
        "reward_rejected": mean(beta * pair.rejected_ratio),
        "margin": mean(beta * difference),
        "accuracy": mean(_wins(difference)),
        "chosen_drift": mean(pair.chosen_drift),
        "rejected_drift": mean(pair.rejected_drift),
        "kl_per_token": per_token(pair.kl),
    }
    if pair.vocabulary_kl is not None:
        metrics["vocabulary_kl_per_token"] = per_token(pair.vocabulary_kl)
    if pair.contrast_ratio is not None:
        contrast = pair.chosen_ratio - pair.contrast_ratio
        metrics["contrast_margin"] = mean(beta * contrast)
        metrics["contrast_accuracy"] = mean(_wins(contrast))
    return metrics


def grouped_metrics(
    pair: PairScores,
    beta: float,
    *,
    kinds: Mapping[str, int] = MappingProxyType({}),
    pair_kind: jax.Array | None = None,
    pair_duration: jax.Array | None = None,
) -> dict[str, WeightedSum]:
    """`preference_metrics` of the pairs of each kind of question and each duration bin: GROUPED.

    Args:
      kinds: name -> number in the batch, reported as kind/<name>/margin and so on.
      pair_kind: uint32[B], number of each row's kind; None leaves kinds out.
      pair_duration: float32[B], seconds of each row's video; None leaves durations out.
    """
    groups: dict[str, jax.Array] = {}
    if pair_kind is not None:
        groups |= {f"kind/{kind}": pair_kind == np.uint32(number) for kind, number in kinds.items()}
    if pair_duration is not None:
        for name, (low, high) in DURATION_BINS.items():
            groups[f"duration/{name}"] = (pair_duration >= low) & (pair_duration < high)

    def of_pairs(inside: jax.Array) -> jax.Array:
        return jnp.repeat(inside, len(pair.valid) // len(inside))  # K - 1 pairs a row

    metrics = {}
    for group, inside in groups.items():
        part = dataclasses.replace(pair, valid=pair.valid * of_pairs(inside))
        found = preference_metrics(part, beta)
        metrics |= {f"{group}/{name}": found[name] for name in GROUPED}
    return metrics


def _wins(difference: jax.Array) -> jax.Array:
    """1 where above 0, 1/2 on a tie."""
    return (jnp.sign(difference) + 1) / 2
