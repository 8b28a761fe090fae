"""Preference losses against golden values, computed in float64 from the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.objectives.preference import (
    PREFERENCE_LOSSES,
    PairScores,
    PreferenceConfig,
    pair_scores,
    preference_losses,
    preference_metrics,
)

PAIRS = PairScores(
    policy_chosen=jnp.array([-12, -30.5, -8.25, -45]),
    policy_rejected=jnp.array([-14.0, -28, -9, -60]),
    reference_chosen=jnp.array([-13.0, -31, -8, -50]),
    reference_rejected=jnp.array([-13.5, -29.5, -8.5, -58]),
    chosen_length=jnp.array([10.0, 25, 6, 40]),
    rejected_length=jnp.array([12.0, 20, 7, 64]),
    valid=jnp.ones(4),
)
# beta = 0.3; label smoothing 0.1 for cdpo and robust
GOLDEN = {
    "sigmoid": ([0.493249, 0.854355, 0.656350, 0.115520], 0.529868),
    "cdpo": ([0.538249, 0.824355, 0.663850, 0.325520], 0.587993),
    "robust": ([0.436999, 0.891855, 0.646975, -0.146980], 0.457212),
    "hinge": ([0.55, 1.3, 0.925, 0.0], 0.69375),
    "ipo": ([2.325625, 2.964136, 2.679457, 2.281359], 2.562644),
    "apo_zero": ([0.888128, 1.073209, 0.981311, 0.536769], 0.869854),
    "sigmoid_norm": ([0.672123, 0.701431, 0.688693, 0.669984], 0.683058),
}


def config(loss, **options):
    smoothing = 0.1 if loss in ("cdpo", "robust") else 0.0
    return PreferenceConfig(beta=0.3, loss=loss, label_smoothing=smoothing, **options)


def row(pairs, index):
    return jax.tree.map(lambda x: x[index : index + 1], pairs)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    each, mean = GOLDEN[name]
    rows = [preference_losses(row(PAIRS, i), config(name))[name].mean() for i in range(4)]
    np.testing.assert_allclose(rows, each, atol=2e-6)
    whole = preference_losses(PAIRS, config(name))[name].mean()
    np.testing.assert_allclose(whole, mean, atol=2e-6)


def test_every_pairwise_loss_has_golden_values():
    assert set(GOLDEN) == set(PREFERENCE_LOSSES) - {"sft"}


def test_temporal_preference_optimization_is_sigmoid_plus_weighted_sft():
    options = config("sigmoid", sft=0.5)
    terms = preference_losses(PAIRS, options)
    np.testing.assert_allclose(terms["sft"].mean(), 95.75 / 81, atol=2e-6)
    total = sum(weight * terms[name].mean() for name, weight in options.weights.items())
    np.testing.assert_allclose(total, 1.120918, atol=2e-6)


def test_several_losses_with_weights():
    options = config({"sigmoid": 0.8, "hinge": 0.2})
    assert options.weights == {"sigmoid": 0.8, "hinge": 0.2, "sft": 0.0}
    assert set(preference_losses(PAIRS, options)) == {"sigmoid", "hinge", "sft"}


def test_metrics():
    means = {k: float(v.mean()) for k, v in preference_metrics(PAIRS, beta=0.3).items()}
    assert means["accuracy"] == 0.75
    np.testing.assert_allclose(means["margin"], 0.58125, atol=1e-6)
    np.testing.assert_allclose(means["reward_chosen"], 0.3 * (1 + 0.5 - 0.25 + 5) / 4, atol=1e-6)
    np.testing.assert_allclose(means["reward_rejected"], 0.3 * (-1.5) / 4, atol=1e-6)
    np.testing.assert_allclose(means["chosen_drift"], 6.25 / 4, atol=1e-6)


@pytest.mark.parametrize("name", [*GOLDEN, "sft"])
def test_rows_that_are_not_valid_count_for_nothing(name):
    """Not even through the gradient, whatever the padding row holds."""

    def loss(policy_chosen, valid, pairs=PAIRS):
        pairs = PairScores(policy_chosen, *jax.tree.leaves(pairs)[1:-1], valid)
        return preference_losses(pairs, config(name))[name].mean()

    kept, gradient = jax.value_and_grad(loss)(PAIRS.policy_chosen, jnp.array([1.0, 1, 0, 1]))
    wanted = loss(PAIRS.policy_chosen[jnp.array([0, 1, 3])], jnp.ones(3),
                  jax.tree.map(lambda x: x[jnp.array([0, 1, 3])], PAIRS))
    np.testing.assert_allclose(kept, wanted, rtol=1e-6)
    assert gradient[2] == 0


def test_equal_policy_and_reference_give_log_two_for_any_beta():
    logps = jnp.array([[[-1.0, -2, -3], [-4, -5, -6]]])
    pair = pair_scores(logps, logps, jnp.ones((1, 2, 3)), jnp.array([True]))
    for beta in (0.1, 5.0):
        loss = preference_losses(pair, PreferenceConfig(beta=beta))["sigmoid"].mean()
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_pair_scores_sum_weighted_tokens_of_both_branches():
    logps = jnp.array([[[-1.0, -2, -4], [-8, -16, -32]]])
    weights = jnp.array([[[1.0, 0, 1], [1, 1, 0]]])
    pair = pair_scores(logps, 2 * logps, weights, jnp.array([True]))
    assert (float(pair.policy_chosen[0]), float(pair.policy_rejected[0])) == (-5, -24)
    assert (float(pair.reference_chosen[0]), float(pair.reference_rejected[0])) == (-10, -48)
    assert (float(pair.chosen_length[0]), float(pair.rejected_length[0])) == (2, 2)


def test_hinge_and_sigmoid_stay_finite_at_extreme_margins():
    far = PairScores(jnp.array([1e6, -1e6]), *[jnp.zeros(2)] * 3, *[jnp.ones(2)] * 3)
    for name in GOLDEN:
        value, gradient = jax.value_and_grad(
            lambda p, name=name: preference_losses(
                PairScores(p, *jax.tree.leaves(far)[1:]), config(name)
            )[name].mean()
        )(far.policy_chosen)
        assert np.isfinite(value) and np.all(np.isfinite(gradient)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.3, "loss": "dpo"}, "preference.loss='dpo' is unknown; known: sigmoid"),
        ({"beta": 0.0}, "preference.beta=0.0"),
        ({"beta": 0.3, "loss": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"beta": 0.3, "label_smoothing": 0.1}, "has no effect on 'sigmoid'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**options)


def test_only_sft_needs_no_reference():
    assert not PreferenceConfig(beta=1.0, loss="sft", sft=1.0).needs_reference
    assert PreferenceConfig(beta=1.0).needs_reference
