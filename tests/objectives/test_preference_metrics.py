"""What preference training reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from fake_pairs import golden_pairs, random_pairs

from tpo_jax.objectives.preference import PairTokens, pair_scores, preference_metrics
from tpo_jax.objectives.preference.metrics import GROUPED, grouped_metrics

KINDS = {"order": 7, "action": 2**32 - 1, "causal": 0, "spatial": 4}

scores = jax.jit(pair_scores, static_argnames=("divergence", "ld_alpha"))
report = jax.jit(preference_metrics, static_argnames=("beta", "reference"))
PAIR = scores(golden_pairs())


def means(metrics):
    return {name: float(value.mean()) for name, value in metrics.items()}


def test_metrics_of_the_golden_pairs():
    got = means(report(PAIR, beta=0.3))
    assert got["accuracy"] == 0.75
    np.testing.assert_allclose(got["margin"], 0.58125, atol=1e-6)
    np.testing.assert_allclose(got["reward_chosen"], 0.3 * (1 + 0.5 - 0.25 + 5) / 4, atol=1e-6)
    np.testing.assert_allclose(got["reward_rejected"], 0.3 * (-1.5) / 4, atol=1e-6)
    np.testing.assert_allclose(got["chosen_drift"], 6.25 / 4, atol=1e-6)
    np.testing.assert_allclose(got["rejected_drift"], -1.5 / 4, atol=1e-6)
    assert got["chosen_length"] == 81 / 4 and got["rejected_length"] == 103 / 4
    # -1.2 against -1.17, -1.22 against -1.4, -1.375 against -1.29, -1.125 against -0.94
    assert got["likelihood_accuracy"] == 0.25
    assert "contrast_margin" not in got


def test_rewards_are_those_of_reverse_kl_whatever_is_trained():
    other = scores(golden_pairs(), divergence="js")
    assert means(report(other, 0.3)) == means(report(PAIR, 0.3))


def test_drift_and_likelihood_are_of_whole_answers_whatever_is_trained():
    whole, desensitised = (report(scores(golden_pairs(), ld_alpha=alpha), 0.3)
                           for alpha in (1.0, 0.2))  # fmt: skip
    for name in ("chosen_drift", "rejected_drift", "likelihood_accuracy"):
        assert whole[name].mean() == desensitised[name].mean(), name
    assert whole["margin"].mean() != desensitised["margin"].mean()


def test_a_tie_is_half_a_win():
    logps = jnp.full((1, 2, 3), -1.0)
    tie = scores(PairTokens(logps, logps, jnp.ones((1, 2, 3)), jnp.ones(1)))
    got = means(report(tie, 0.1))
    assert got["accuracy"] == got["likelihood_accuracy"] == 0.5 and got["kl_per_token"] == 0.0


def test_kl_per_token_is_a_mean_over_tokens_of_valid_pairs():
    tokens = random_pairs(4, 6, invalid=(1,))
    kept = (np.asarray(tokens.weights) > 0) & (np.asarray(tokens.valid) > 0)[:, None, None]
    ratio = np.asarray(tokens.policy - tokens.reference, np.float64)[kept]
    got = means(report(scores(tokens), 0.1))["kl_per_token"]
    np.testing.assert_allclose(got, (np.exp(ratio) - 1 - ratio).mean(), rtol=1e-5)
    exact = means(report(scores(tokens), 0.1))["vocabulary_kl_per_token"]
    np.testing.assert_allclose(exact, np.asarray(tokens.vocabulary_kl)[kept].mean(), rtol=1e-5)
    sidecar = dataclasses.replace(tokens, vocabulary_kl=None)
    assert "vocabulary_kl_per_token" not in report(scores(sidecar), 0.1)


def test_contrast_says_whether_the_frames_matter():
    tokens = golden_pairs()
    lower = dataclasses.replace(
        tokens, contrast_policy=tokens.policy[:, 0] - 0.1, contrast_reference=tokens.reference[:, 0]
    )
    got = means(report(scores(lower), 0.3))
    np.testing.assert_allclose(got["contrast_margin"], 0.3 * 0.1 * 81 / 4, rtol=1e-5)
    assert got["contrast_accuracy"] == 1.0


def test_without_a_reference_only_what_needs_none():
    got = report(PAIR, 0.3, reference=False)
    assert set(got) == {"likelihood_accuracy", "chosen_length", "rejected_length"}


def test_groups_by_kind_and_duration():
    kinds = jnp.array([KINDS[k] for k in ("order", "action", "order", "causal")], jnp.uint32)
    seconds = jnp.array([59.0, 60.0, 200.0, 4000.0])
    groups = grouped_metrics(
        PAIR, 0.3, kinds=KINDS, pair_kind=kinds, pair_duration=seconds
    )
    got = means(groups)
    # Delta is 1.5, -1, 0.25, 7.
    np.testing.assert_allclose(got["kind/order/margin"], 0.3 * (1.5 + 0.25) / 2, atol=1e-6)
    assert got["kind/order/accuracy"] == 1.0 and got["kind/action/accuracy"] == 0.0
    assert float(groups["kind/spatial/margin"].weight) == 0  # a window leaves it out
    np.testing.assert_allclose(got["duration/under_1_min/margin"], 0.45, atol=1e-6)
    np.testing.assert_allclose(got["duration/1_to_3_min/margin"], -0.3, atol=1e-6)
    np.testing.assert_allclose(got["duration/3_to_10_min/margin"], 0.075, atol=1e-6)
    np.testing.assert_allclose(got["duration/over_10_min/margin"], 2.1, atol=1e-6)
    # All that is told of a group is what would be told of its pairs alone.
    alone = means(report(scores(golden_pairs(np.array([0, 2]))), 0.3))
    assert {name.split("/")[2] for name in got} == set(GROUPED) >= {
        "reward_chosen", "reward_rejected", "chosen_drift", "kl_per_token", "chosen_length"}
    for name in GROUPED:
        np.testing.assert_allclose(got[f"kind/order/{name}"], alone[name], rtol=1e-5, err_msg=name)
    padded = dataclasses.replace(PAIR, valid=jnp.array([0.0, 1, 1, 1]))
    got = means(grouped_metrics(padded, 0.3, kinds=KINDS, pair_kind=kinds))
    np.testing.assert_allclose(got["kind/order/margin"], 0.075, atol=1e-6)
