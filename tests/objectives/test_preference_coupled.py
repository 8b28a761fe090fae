"""Losses that compare the pairs of a batch: exact over the global batch, never accumulated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import micro, pair_bucket, random_batch, train_config
from fake_pairs import golden_pairs, random_pairs

from tpo_jax.objectives.preference import (
    PREFERENCE_LOSSES,
    PairTokens,
    PreferenceConfig,
    preference_losses,
)
from tpo_jax.parallel.mesh import batch_sharding, make_mesh
from tpo_jax.training.program import make_program

BETA, SMOOTHING = 0.3, 0.1
COUPLED = [name for name, loss in PREFERENCE_LOSSES.items() if loss.coupled]
# Sums of one-token answers, in an order in which sorting matters.
POLICY = np.array([[-2.0, -9], [-3, -4], [-8, -1], [-5, -5.5]])
REFERENCE = np.array([[-6.0, -5], [-4, -1], [-2, -7], [-5, -9]])


def options(name):
    smoothing = SMOOTHING if "label_smoothing" in PREFERENCE_LOSSES[name].needs else 0.0
    return PreferenceConfig(beta=BETA, loss=name, label_smoothing=smoothing)


def tokens():
    return PairTokens(
        jnp.asarray(POLICY[..., None]), jnp.asarray(REFERENCE[..., None]), jnp.ones((4, 2, 1)),
        jnp.ones(4),
    )  # fmt: skip


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def smoothed(x):
    return -(1 - SMOOTHING) * log_sigmoid(x) - SMOOTHING * log_sigmoid(-x)


def by_hand(name):
    """Each loss in NumPy, from its formula."""
    ratio = POLICY - REFERENCE
    if name == "aot":
        high, low = (np.sort(x[:, 0] - x[:, 1]) for x in (POLICY, REFERENCE))
        return smoothed(BETA * (high - low)).mean()
    if name == "aot_unpaired":
        return smoothed(BETA * (np.sort(ratio[:, 0]) - np.sort(ratio[:, 1]))).mean()
    if name == "kto_pair":
        chosen_kl, rejected_kl = np.maximum(ratio.mean(0), 0)
        sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
        both = [1 - sigma(BETA * (ratio[:, 0] - rejected_kl)),
                1 - sigma(BETA * (chosen_kl - ratio[:, 1]))]  # fmt: skip
        return np.concatenate(both).mean()
    assert name == "bco"
    shift = BETA * ratio.mean()
    return -(log_sigmoid(BETA * ratio[:, 0] - shift)
             + log_sigmoid(shift - BETA * ratio[:, 1])).mean()  # fmt: skip


jit = jax.jit


def losses_of(pairs, names=COUPLED):
    return {name: preference_losses(pairs, options(name))[name].mean() for name in names}


def test_values_by_hand():
    names = (*COUPLED, "cdpo")
    run = jit(functools.partial(losses_of, names=names))
    whole = run(tokens())
    halves = [run(jax.tree.map(lambda x, r=r: x[r], tokens()))
              for r in (slice(0, 2), slice(2, 4))]  # fmt: skip
    for name in COUPLED:
        np.testing.assert_allclose(whole[name], by_hand(name), rtol=1e-6, err_msg=name)
        # The batch matters: the mean of its halves is another number.
        assert abs(np.mean([half[name] for half in halves]) - by_hand(name)) > 1e-3, name
    # Sorting pairs others than the rows do.
    assert abs(whole["cdpo"] - by_hand("aot")) > 1e-2


def test_golden_value_of_aot_unpaired():
    got = preference_losses(golden_pairs(), PreferenceConfig(beta=0.3, loss="aot_unpaired"))
    np.testing.assert_allclose(got["aot_unpaired"].mean(), 0.453094, atol=2e-6)


def test_no_gradient_goes_through_the_statistics_of_the_batch():
    """Moving one pair changes the statistics; the other pairs' gradients count only themselves."""
    pairs = tokens()

    def loss(policy, name):
        return losses_of(dataclasses.replace(pairs, policy=policy), [name])[name]

    for name in ("kto_pair", "bco"):
        gradient = np.asarray(jit(jax.grad(functools.partial(loss, name=name)))(pairs.policy))
        # A step that raises the chosen and lowers the rejected answer lowers every pair's loss.
        assert np.all(gradient[:, 0] < 0) and np.all(gradient[:, 1] > 0), name


def several_by_hand(name, policy, fixed):
    """kto_pair or bco over rows of one, two and three rejected answers, in float64.

    Args:
      policy: {row: [log pi of the chosen answer, of each rejected one]}. fixed: the same, from
        which the statistics of the batch are, that no gradient goes through.
    """

    def means(policy):
        """Of r_w and r_l: a row counts once, however many answers it rejects."""
        ratios = [np.subtract(policy[row], SEVERAL_REFERENCE[row]) for row in policy]
        return np.mean([r[0] for r in ratios]), np.mean([r[1:].mean() for r in ratios])

    mean_chosen, mean_rejected = means(fixed)
    losses = []
    for row, sums in policy.items():
        chosen, *rejected = np.subtract(sums, SEVERAL_REFERENCE[row])
        if name == "kto_pair":
            chosen_kl, rejected_kl = max(mean_chosen, 0), max(mean_rejected, 0)
            each = [0.5 / (1 + np.exp(BETA * (chosen - rejected_kl)))
                    + 0.5 / (1 + np.exp(BETA * (chosen_kl - r))) for r in rejected]
        else:
            shift = BETA * (mean_chosen + mean_rejected) / 2
            each = [-log_sigmoid(BETA * chosen - shift) - log_sigmoid(shift - BETA * r)
                    for r in rejected]  # fmt: skip
        losses.append(np.mean(each))
    return np.mean(losses)


SEVERAL_POLICY = {0: [-2.0, -9.0], 1: [-3.0, -4.0, -7.5], 2: [-4.5, -1.0, -6.0, -2.0]}
SEVERAL_REFERENCE = {0: [-6.0, -5.0], 1: [-4.0, -8.0, -7.0], 2: [-5.0, -2.5, -6.5, -9.0]}


@pytest.mark.parametrize("name", ["kto_pair", "bco"])
def test_rows_of_several_rejected_answers_are_compared_over_the_whole_batch(name):
    """Value and gradient by hand; a row of padding and answers that are not there hold NaN."""

    def padded(sums):
        rows = [[*sums[row], *[np.nan] * (4 - len(sums[row]))] for row in sums]
        return jnp.asarray([*rows, [np.nan] * 4])[..., None]

    policy = padded(SEVERAL_POLICY)
    pairs = PairTokens(policy, padded(SEVERAL_REFERENCE), jnp.isfinite(policy).astype(jnp.float32),
                       jnp.array([1.0, 1, 1, 0]))  # fmt: skip

    def loss(policy):
        return losses_of(dataclasses.replace(pairs, policy=policy), [name])[name]

    value, gradient = jit(jax.value_and_grad(loss))(policy)
    want = several_by_hand(name, SEVERAL_POLICY, SEVERAL_POLICY)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for row, sums in SEVERAL_POLICY.items():
        for answer in range(4):
            wanted = 0.0
            if answer < len(sums):
                step = np.eye(len(sums))[answer] * 1e-4
                up, down = (several_by_hand(name, SEVERAL_POLICY | {row: sums + sign * step},
                                            SEVERAL_POLICY) for sign in (1, -1))  # fmt: skip
                wanted = (up - down) / 2e-4
            np.testing.assert_allclose(gradient[row, answer, 0], wanted, rtol=1e-4, atol=1e-7)
    assert np.all(np.asarray(gradient)[3] == 0)


def test_eight_devices_see_the_whole_batch():
    """Rows over eight devices, one of them padding: the value and gradient of one device."""
    mesh = make_mesh({"data": 8}, jax.devices()[:8])
    pairs = random_pairs(16, 5, seed=3, invalid=(2, 9))

    def total(policy, pairs):
        values = losses_of(dataclasses.replace(pairs, policy=policy))
        return sum(values.values()), values

    step = jax.value_and_grad(total, has_aux=True)
    (_, want), wanted_gradient = jit(step)(pairs.policy, pairs)
    split = jax.device_put(pairs, batch_sharding(mesh))
    (_, got), gradient = jit(step, out_shardings=(None, batch_sharding(mesh)))(split.policy, split)
    assert len(gradient.sharding.device_set) == 8
    for name in COUPLED:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", COUPLED)
def test_accumulation_is_refused_by_name(name):
    config = train_config(objective="preference", accumulation=2)
    config.preference.update(loss=name, beta=BETA)
    mesh = make_mesh({}, jax.devices()[:1])
    message = rf"accumulation=2 would change preference/{name}.*config.accumulation=1"
    with pytest.raises(ValueError, match=message):
        make_program(config, micro(), mesh)
    config.preference.loss = "sigmoid"
    assert make_program(config, micro(), mesh).objective.coupled == ()


def test_a_second_batch_in_the_step_is_refused_by_name():
    """Pairs of one would not be compared with those of the other: another loss."""
    mesh = make_mesh({}, jax.devices()[:1])
    config = train_config(objective="preference")
    config.preference.update(loss="kto_pair", beta=BETA)
    batch = random_batch(pair_bucket(2), micro())
    message = "a second batch in the step would change preference/kto_pair.*buckets.*beside"
    with pytest.raises(ValueError, match=message):
        make_program(config, micro(), mesh).lower_gradient(batch | {"beside": batch})
