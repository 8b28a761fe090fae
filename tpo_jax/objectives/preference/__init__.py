"""Preference losses: pure functions of per-token log-probabilities of two answers.

`pair` holds what the losses read, `losses` the formulas, `registry` their names and options,
`metrics` what is reported. A new loss is one function in `losses` and one entry in `registry`.
"""

from tpo_jax.objectives.preference.metrics import preference_metrics
from tpo_jax.objectives.preference.pair import PairScores, PairTokens, pair_scores
from tpo_jax.objectives.preference.registry import (
    PREFERENCE_LOSSES,
    PreferenceConfig,
    PreferenceLoss,
    preference_losses,
)

__all__ = [
    "PREFERENCE_LOSSES", "PairScores", "PairTokens", "PreferenceConfig", "PreferenceLoss",
    "pair_scores", "preference_losses", "preference_metrics",
]  # fmt: skip
