"""Preference losses against golden values, computed in float64 from the published formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_pairs import golden_pairs, random_pairs

from tpo_jax.objectives.preference import (
    PREFERENCE_LOSSES,
    PairTokens,
    PreferenceConfig,
    pair_scores,
    preference_losses,
)
from tpo_jax.objectives.preference.pair import LARGEST_EXPONENT, divergence_score, every_pair
from tpo_jax.parallel.weighted_sum import WeightedSum

# beta = 0.3; label smoothing 0.1, for exo_pair 1e-3
GOLDEN = {
    "sigmoid": ([0.493249, 0.854355, 0.656350, 0.115520], 0.529868),
    "cdpo": ([0.538249, 0.824355, 0.663850, 0.325520], 0.587993),
    "robust": ([0.436999, 0.891855, 0.646975, -0.146980], 0.457212),
    "hinge": ([0.55, 1.3, 0.925, 0.0], 0.69375),
    "ipo": ([2.325625, 2.964136, 2.679457, 2.281359], 2.562644),
    "exo_pair": ([2.021759, 3.286512, 2.632492, 0.409883], 2.087661),
    "nca_pair": ([1.292011, 1.478060, 1.370004, 1.270864], 1.352735),
    "bco_pair": ([1.175312, 1.564206, 1.352307, 0.638901], 1.182682),
    "sppo_hard": ([1.805556, 11.388889, 5.034722, 11.222222], 7.362847),
    "apo_zero": ([0.888128, 1.073209, 0.981311, 0.536769], 0.869854),
    "apo_down": ([0.963803, 1.111872, 0.962518, 0.926671], 0.991216),
    "discopop": ([0.637610, 0.855580, 0.878234, 0.122456], 0.623470),
    "sigmoid_norm": ([0.672123, 0.701431, 0.688693, 0.669984], 0.683058),
    "simpo": ([1.362431, 1.063497, 1.446858, 1.600413], 1.368300),
    "orpo": ([0.717461, 0.577373, 0.755688, 0.849713], 0.725059),
}
UNPUBLISHED = {"sft", "rpo", "conditional", "anchor", "chosen_kl", "vocabulary_kl"}  # below
COUPLED = {"aot", "aot_unpaired", "kto_pair", "bco"}  # test_preference_coupled.py
DIVERGENCES = {
    "forward_kl": ([0.519365, 0.752310, 0.639938, 0.103627], 0.503810),
    "js": ([0.598929, 0.734883, 0.671173, 0.424857], 0.607461),
    "alpha": ([0.510413, 0.789297, 0.648908, 0.186995], 0.533903),
}


def config(loss, **options):
    if loss in ("cdpo", "robust", "aot", "aot_unpaired"):
        options = {"label_smoothing": 0.1} | options
    if loss == "exo_pair":
        options = {"label_smoothing": 1e-3} | options
    if loss == "simpo":
        options = {"beta": 2.0, "simpo_gamma": 1.0} | options
    return PreferenceConfig(**{"beta": 0.3, "loss": loss} | options)


def loss_of(name, tokens, **options):
    return preference_losses(tokens, config(name, **options))[name].mean()


jit = jax.jit


def every_loss(tokens):
    """float32[losses], in the order of the registry."""
    return jnp.stack([loss_of(name, tokens) for name in PREFERENCE_LOSSES])


def named(values):
    return dict(zip(PREFERENCE_LOSSES, np.asarray(values).T, strict=True))


@pytest.fixture(scope="module")
def golden():
    """{loss: float32[5]}: of each of the four pairs, and of all of them."""
    contrast = {f"contrast_{side}": jnp.zeros((4, 64)) for side in ("policy", "reference")}
    tokens = dataclasses.replace(
        golden_pairs(), **contrast, vocabulary_kl=jnp.zeros((4, 2, 64))
    )
    rows = jax.tree.map(lambda x: x[:, None], tokens)
    each = jit(jax.vmap(every_loss))(rows)
    return named(np.concatenate([each, jit(every_loss)(tokens)[None]]))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(golden, name):
    each, mean = GOLDEN[name]
    np.testing.assert_allclose(golden[name], [*each, mean], rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_golden_values_of_divergences(divergence):
    each, mean = DIVERGENCES[divergence]
    loss = jit(lambda tokens: loss_of("sigmoid", tokens, divergence=divergence))
    rows = [loss(golden_pairs(slice(i, i + 1))) for i in range(4)]
    np.testing.assert_allclose([*rows, loss(golden_pairs())], [*each, mean], atol=3e-6)


def test_alpha_divergence_of_1_is_reverse_kl():
    ratio = jnp.array([-3.0, 0.0, 2.0])
    near = divergence_score(ratio, "alpha", 1.0 - 1e-4)
    np.testing.assert_allclose(near, ratio, atol=1e-3)
    np.testing.assert_array_equal(divergence_score(ratio, "alpha", 1.0), ratio)


def test_every_loss_is_tested_by_name():
    assert set(PREFERENCE_LOSSES) == set(GOLDEN) | UNPUBLISHED | COUPLED


def test_temporal_preference_optimization_is_sigmoid_plus_weighted_sft():
    options = config("sigmoid", sft=0.5)
    terms = preference_losses(golden_pairs(), options)
    np.testing.assert_allclose(terms["sft"].mean(), 95.75 / 81, atol=2e-6)
    total = sum(weight * terms[name].mean() for name, weight in options.weights.items())
    np.testing.assert_allclose(total, 1.120918, atol=2e-6)


def test_rpo_adds_the_mean_likelihood_of_each_chosen_answer():
    nll = np.mean([12 / 10, 30.5 / 25, 8.25 / 6, 45 / 40])
    got = loss_of("rpo", golden_pairs(), rpo_alpha=0.5)
    np.testing.assert_allclose(got, GOLDEN["sigmoid"][1] + 0.5 * nll, atol=2e-6)


def test_anchor_and_conditional_of_mdpo():
    sigma = 1 / (1 + np.exp(-0.3 * np.array([1, 0.5, -0.25, 5])))
    np.testing.assert_allclose(loss_of("anchor", golden_pairs()), -np.log(sigma).mean(), atol=2e-6)
    tokens = golden_pairs()
    # Under the manipulated frames every chosen token loses a tenth, for policy and not reference.
    contrast = dataclasses.replace(
        tokens, contrast_policy=tokens.policy[:, 0] - 0.1, contrast_reference=tokens.reference[:, 0]
    )
    gain = 0.3 * 0.1 * np.array([10, 25, 6, 40])
    want = np.log1p(np.exp(-gain)).mean()
    np.testing.assert_allclose(loss_of("conditional", contrast), want, atol=2e-6)


def test_token_kl_is_unbiased_where_answers_are_drawn_from_the_reference():
    reference, policy = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    kl = (reference * np.log(reference / policy)).sum()
    # One row a word of the vocabulary, as often as the reference draws it.
    logps = np.repeat(np.log([policy, reference])[:, :, None, None], 2, axis=2)
    tokens = PairTokens(*map(jnp.asarray, logps), jnp.ones((3, 2, 1)), jnp.asarray(reference))
    np.testing.assert_allclose(loss_of("chosen_kl", tokens), kl, rtol=1e-5)


def test_rrpo_sums_the_kl_of_the_vocabulary_over_the_tokens_of_the_chosen_answer():
    tokens = random_pairs(4, 5, invalid=(1,))
    kl = np.where(np.asarray(tokens.weights) > 0, tokens.vocabulary_kl, 0.0)[[0, 2, 3]].sum(-1)
    np.testing.assert_allclose(loss_of("vocabulary_kl", tokens), kl[:, 0].mean(), rtol=1e-6)


def test_length_desensitised_logps_weigh_the_tail_of_the_longer_answer():
    tokens = PairTokens(
        jnp.full((1, 2, 4), -1.0), jnp.zeros((1, 2, 4)),
        jnp.array([[[1.0, 0, 1, 1], [1, 1, 0, 0]]]), jnp.ones(1),
    )  # fmt: skip
    scores = jit(lambda t: [pair_scores(t, ld_alpha=alpha) for alpha in (0.25, 1.0, 0.0)])
    pair, plain, none = scores(tokens)
    assert (float(pair.policy_chosen[0]), float(pair.policy_rejected[0])) == (-2.25, -2.0)
    assert float(pair.chosen_nll[0]) == 3.0 and float(pair.chosen_length[0]) == 3.0
    assert float(plain.policy_chosen[0]) == -3.0 and float(none.policy_chosen[0]) == -2.0


def test_length_desensitising_moves_the_losses_of_sums_and_no_other():
    tokens = random_pairs(5, 6, invalid=(1,))

    @jit
    def values(tokens):
        pairs = [pair_scores(tokens, ld_alpha=alpha) for alpha in (1.0, 0.5)]
        return {name: [value_of(name, pair) for pair in pairs] for name in PREFERENCE_LOSSES}

    def value_of(name, pair):
        loss, options = PREFERENCE_LOSSES[name], config(name)
        value = loss.function(pair, **{option: getattr(options, option) for option in loss.needs})
        return value.mean() if isinstance(value, WeightedSum) else (value * pair.valid).sum()

    moved = {name for name, (plain, other) in values(tokens).items() if plain != other}
    assert moved == {name for name, loss in PREFERENCE_LOSSES.items() if loss.sums}


def test_the_contrast_is_length_desensitised_like_the_answer_it_is_of():
    tokens = random_pairs(4, 6, invalid=(1,))
    same = dataclasses.replace(
        tokens, contrast_policy=tokens.policy[:, 0], contrast_reference=tokens.reference[:, 0]
    )
    pair = jit(lambda t: pair_scores(t, ld_alpha=0.3))(same)
    longer = np.asarray(pair.chosen_length > pair.rejected_length) & (np.asarray(pair.valid) > 0)
    assert longer.any() and np.all(np.abs(pair.chosen_ratio - pair.chosen_drift)[longer] > 0.1)
    np.testing.assert_allclose(pair.contrast_ratio, pair.chosen_ratio, rtol=1e-6)


def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them_without_a_gradient():
    tokens = golden_pairs()
    collision = jnp.full_like(tokens.policy, -1.0)
    tokens = dataclasses.replace(tokens, log_collision=collision)
    mean = lambda sums, n: np.exp(sums / n + 1.0)  # noqa: E731
    weight = mean(np.array([-12, -30.5, -8.25, -45]), np.array([10, 25, 6, 40])) * mean(
        np.array([-14, -28, -9, -60]), np.array([12, 20, 7, 64])
    )
    terms = jit(lambda tokens: preference_losses(tokens, config("sigmoid", wpo=True)))(tokens)
    want = (weight * GOLDEN["sigmoid"][0]).mean()
    np.testing.assert_allclose(terms["sigmoid"].mean(), want, rtol=1e-5)
    np.testing.assert_allclose(terms["sft"].mean(), 95.75 / 81, atol=2e-6)

    def gradient(wpo):
        def loss(policy):
            pairs = dataclasses.replace(tokens, policy=policy)
            return preference_losses(pairs, config("sigmoid", wpo=wpo))["sigmoid"].total

        return jit(jax.grad(loss))(tokens.policy)

    np.testing.assert_allclose(gradient(True), gradient(False) * weight[:, None, None], rtol=1e-4)


def test_several_losses_with_weights():
    options = config({"sigmoid": 0.8, "hinge": 0.2})
    assert options.weights == {"sigmoid": 0.8, "hinge": 0.2, "sft": 0.0}
    assert set(preference_losses(golden_pairs(), options)) == {"sigmoid", "hinge", "sft"}
    assert config(["sigmoid", "sft"], sft=0.5).weights == {"sigmoid": 1.0, "sft": 1.5}


@pytest.fixture(scope="module")
def values_and_gradients():
    """Function of PairTokens: {loss: value}, {loss: gradient float32[B, 2, A]}, of the policy's
    log-probabilities and of its KL added up."""

    @jit
    def run(tokens):
        def values(policy, kl):
            return every_loss(dataclasses.replace(tokens, policy=policy, vocabulary_kl=kl))

        at = tokens.policy, tokens.vocabulary_kl
        return values(*at), sum(jax.jacrev(values, (0, 1))(*at))

    def both(tokens):
        values, gradients = run(tokens)
        return named(values), dict(zip(PREFERENCE_LOSSES, np.asarray(gradients), strict=True))

    return both


def test_rows_that_are_not_valid_count_for_nothing(values_and_gradients):
    """Not even through the gradient, and though they hold NaN; nor does padding."""
    tokens = random_pairs(5, 4, invalid=(2, 3))
    values, gradients = values_and_gradients(tokens)
    # The same pairs, with a copy of one of them and no padding in place of what is not valid.
    rng = np.random.default_rng(1)
    other = jax.tree.map(lambda x: x.at[jnp.array([2, 3])].set(rng.uniform()), tokens)
    other = dataclasses.replace(other, valid=tokens.valid)
    wanted, wanted_gradients = values_and_gradients(other)
    alone = named(jit(every_loss)(jax.tree.map(lambda x: x[np.array([0, 1, 4])], tokens)))
    for name, value in values.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-5, err_msg=name)
        assert value == wanted[name]
        np.testing.assert_array_equal(gradients[name], wanted_gradients[name], err_msg=name)
        assert np.all(gradients[name][2:4] == 0), name
        assert np.all(gradients[name][np.asarray(tokens.weights) == 0] == 0), name
        assert np.abs(gradients[name]).max() > 0, name


def test_rows_of_several_rejected_answers_are_their_pairs():
    """Chosen and up to two rejected answers: the loss and the gradient of each row are the mean of
    its pairs, each scored alone; and the likelihood of a chosen answer counts once."""
    rows, more = (random_pairs(3, 4, seed, invalid=()) for seed in (0, 7))
    three = {name: jnp.concatenate([getattr(rows, name), getattr(more, name)[:, 1:]], axis=1)
             for name in ("policy", "reference", "weights", "log_collision", "vocabulary_kl")}
    three["weights"] = three["weights"].at[1, 2].set(0)  # the second row has one rejected answer
    names = ("sigmoid", "ipo", "conditional", "hinge", "vocabulary_kl")
    row, rejected = np.array([0, 0, 1, 2, 2]), np.array([1, 2, 1, 1, 2])
    share = np.array([1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6])

    def values(tokens):
        return jnp.stack([loss_of(name, tokens) for name in names])

    def of_rows(policy):
        tokens = dataclasses.replace(rows, **three | {"policy": policy})
        return jnp.append(values(tokens), loss_of("sft", tokens))

    def of_pairs(policy):
        alone = {name: jnp.stack([x[row, 0], x[row, rejected]], axis=1)[:, None]
                 for name, x in (three | {"policy": policy}).items()}  # fmt: skip
        for name in ("contrast_policy", "contrast_reference"):
            alone[name] = getattr(rows, name)[row][:, None]
        pairs = share @ jax.vmap(values)(PairTokens(**alone, valid=jnp.ones((5, 1))))
        two = dataclasses.replace(rows, policy=policy[:, :2])
        return jnp.append(pairs, loss_of("sft", two))

    (got, gradient), (want, wanted) = (
        jit(lambda policy, f=f: (f(policy), jax.jacrev(f)(policy)))(three["policy"])
        for f in (of_rows, of_pairs)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert every_pair(rows) is rows  # one rejected answer: nothing is computed otherwise
    assert np.abs(gradient[0, 0, 2]).max() > 0 and np.all(gradient[:, 1, 2] == 0)
    with pytest.raises(ValueError, match="branches=3: aot sorts pairs"):
        loss_of("aot", dataclasses.replace(rows, **three))


def test_equal_policy_and_reference_give_log_two_for_any_beta():
    logps = jnp.array([[[-1.0, -2, -3], [-4, -5, -6]]])
    tokens = PairTokens(logps, logps, jnp.ones((1, 2, 3)), jnp.array([True]))
    divergences = ("reverse_kl", *DIVERGENCES)
    cases = [(beta, divergence) for beta in (0.1, 5.0) for divergence in divergences]

    @jit
    def losses(tokens):
        return [loss_of("sigmoid", tokens, beta=b, divergence=d) for b, d in cases]

    np.testing.assert_allclose(losses(tokens), np.log(2), rtol=1e-6)


AROUND_THE_CLAMP = (43.0, 45.0, LARGEST_EXPONENT - 1, LARGEST_EXPONENT, LARGEST_EXPONENT + 1)


def test_losses_stay_finite_at_extreme_margins(values_and_gradients):
    """But for discopop, whose formula has e^-x, and the squared losses far beyond this."""
    for far in (*AROUND_THE_CLAMP, 3e4, *(-x for x in AROUND_THE_CLAMP), -3e4):
        tokens = random_pairs(5, 4, invalid=())
        shift = jnp.zeros((5, 2, 4)).at[0, 0, 0].set(far).at[1, 1, 0].set(far)
        values, gradients = values_and_gradients(
            dataclasses.replace(tokens, policy=tokens.policy + shift)
        )
        for name, value in values.items():
            if name != "discopop":
                assert np.isfinite(value) and np.all(np.isfinite(gradients[name])), name
    near = dataclasses.replace(tokens, policy=tokens.policy - shift / 1e3)
    assert all(np.isfinite(x["discopop"]).all() for x in values_and_gradients(near))


@pytest.mark.parametrize(
    ("divergence", "alpha", "sign"), [("forward_kl", 0.5, -1), ("alpha", 2.0, 1)]
)
def test_scores_and_gradients_are_finite_around_the_clamp(divergence, alpha, sign):
    """They rise up to it and are level behind. Squares of the gradients leave float32 before it."""

    def score(ratio):
        return divergence_score(ratio, divergence, alpha)

    def loss(ratio):
        return -jax.nn.log_sigmoid(0.3 * score(ratio))

    run = jit(jax.vmap(lambda ratio: (score(ratio), jax.grad(score)(ratio), jax.grad(loss)(ratio))))
    scores, slopes, gradients = run(sign * jnp.array([*AROUND_THE_CLAMP, 3e4]))
    assert all(np.isfinite(x).all() for x in (scores, slopes, gradients))
    assert np.all(np.diff(sign * scores) >= 0) and slopes[2] > 1e34 and np.all(slopes[4:] == 0)
    np.testing.assert_array_equal(np.isfinite(slopes**2)[:4], [True, False, False, False])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "preference.loss='dpo' is unknown; known: sigmoid"),
        ({"beta": 0.0}, "preference.beta=0.0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"label_smoothing": 0.1}, "has no effect on 'sigmoid'.*cdpo"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect.*simpo"),
        ({"divergence_alpha": 0.7}, "divergence_alpha=0.7 has no effect.*'alpha'"),
        ({"loss": "exo_pair"}, "label_smoothing=0.0: exo_pair.*1e-3"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5"),
        ({"loss": ["sigmoid", "simpo"], "ld_alpha": 0.5}, "ld_alpha=0.5: simpo.*ld_alpha=1.0"),
        ({"loss": "orpo", "ld_alpha": 0.0}, "ld_alpha=0.0: orpo is of means"),
        ({"divergence": "kl"}, "divergence='kl' is unknown; known: reverse_kl"),
        ({"loss": "bco_pair", "divergence": "js"}, "'js': bco_pair is defined for reverse_kl only"),
        ({"loss": ["sigmoid", "aot"], "wpo": True}, "wpo=True: aot sorts the batch"),
        ({"loss": "sft", "wpo": True}, "wpo=True has no effect on 'sft'"),
        ({"loss": {}, "sft": 1.0, "wpo": True}, "wpo=True has no effect on {}"),
        ({"loss": "sft", "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect on 'sft'.*sigmoid"),
        ({"loss": ["sft", "chosen_kl"], "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**{"beta": 0.3} | options)


def test_which_losses_need_what():
    assert not PreferenceConfig(beta=1.0, loss=["sft", "simpo", "orpo"]).needs_reference
    assert PreferenceConfig(beta=1.0).needs_reference
    assert PreferenceConfig(beta=1.0, loss="conditional").needs_contrast
    assert not PreferenceConfig(beta=1.0, loss="anchor").needs_contrast
    assert PreferenceConfig(beta=1.0, loss="vocabulary_kl").needs_vocabulary_kl
    assert not PreferenceConfig(beta=1.0, loss="chosen_kl").needs_vocabulary_kl
    assert PreferenceConfig(beta=1.0, loss={"aot": 1.0, "bco": 0.0}).coupled == ("aot",)
