"""Every loss of TRL's DPO trainer, SimPO and ORPO, and their gradients, by TRL itself on the same
log-probabilities.

A trainer's loss method is called on a stand-in that has its options; the model that the DPO trainer
calls returns our random token log-probabilities instead of running.
"""

import ast
import collections
import dataclasses
import functools
import inspect
import re
import types

import jax
import numpy as np
import pytest
from fake_pairs import random_pairs

from tpo_jax.objectives.preference import PreferenceConfig, preference_losses
from tpo_jax.objectives.preference.pair import LARGEST_EXPONENT

pytestmark = pytest.mark.parity

BETA = 0.3
PROMPT = 3  # tokens before the answers, which TRL's masks leave out
SHARED = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
WITH_DIVERGENCE = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip
COEFFICIENT = 0.7  # of the alpha divergence
PAIRS = random_pairs(6, 7, seed=5, invalid=())
# Ratios of which e^-r is no large number: with far ones TRL's discopop multiplies infinity by 0.
NEAR = dataclasses.replace(PAIRS, reference=PAIRS.policy + 0.3 * (PAIRS.reference - PAIRS.policy))


def of_trl(loss, pairs=PAIRS, **options):
    """(loss, gradient float[B, 2, A]) by trl.DPOTrainer; options by its names."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    weights = torch.tensor(np.array(pairs.weights)).swapaxes(0, 1).flatten(0, 1)  # chosen, rejected

    def rows(values):
        """[B, 2, A] -> [2B, PROMPT - 1 + A], 0 where no answer token is predicted, as in TRL."""
        rows = torch.tensor(np.array(values)).swapaxes(0, 1).flatten(0, 1)
        return torch.nn.functional.pad(rows * weights, (PROMPT - 1, 0))

    policy = rows(pairs.policy).requires_grad_()
    zeros = torch.zeros_like(policy)
    outputs = types.SimpleNamespace(
        log_probs=policy * torch.nn.functional.pad(weights, (PROMPT - 1, 0)), entropy=zeros,
        log_sum_sq_probs=rows(pairs.log_collision), mean_logits=zeros, is_top1=zeros.bool(),
    )  # fmt: skip
    mask = torch.nn.functional.pad(weights, (PROMPT, 0))
    reference = np.array(pairs.reference)
    ld_alpha = options.get("ld_alpha")
    sums = (reference * tail_weights(ld_alpha)).sum(-1)
    defaults = {
        "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None, "use_weighting": False,
    }  # fmt: skip
    trainer = types.SimpleNamespace(
        **defaults | options, beta=BETA, loss_types=[loss], loss_weights=[1.0],
        args=types.SimpleNamespace(discopop_tau=0.05), precompute_ref_logps=True,
        model=types.SimpleNamespace(training=True), aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long), "completion_mask": mask.long(),
        "attention_mask": torch.ones_like(mask), "ref_chosen_logps": torch.tensor(sums[:, 0]),
        "ref_rejected_logps": torch.tensor(sums[:, 1]),
    }  # fmt: skip
    value = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    value.backward()
    gradient = policy.grad[:, PROMPT - 1 :].unflatten(0, (2, -1)).swapaxes(0, 1)
    return value.item(), gradient.numpy()


def tail_weights(ld_alpha):
    """TRL takes the reference's sums as they were precomputed, length-desensitised or not."""
    weights = np.array(PAIRS.weights)
    if ld_alpha is None:
        return weights
    shared = weights.sum(-1).min(-1)[:, None, None]
    return weights * np.where(np.arange(1, weights.shape[-1] + 1) <= shared, 1, ld_alpha)


def ours(loss, **options):
    config = PreferenceConfig(beta=BETA, loss=loss, **options)

    def value(policy):
        tokens = dataclasses.replace(PAIRS, policy=policy)
        return preference_losses(tokens, config)[loss].mean()

    run = jax.jit(jax.value_and_grad(value))
    return run(PAIRS.policy)


def check(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
    scale = np.abs(want[1]).max()
    assert scale > 0
    np.testing.assert_allclose(got[1], want[1], atol=2e-5 * scale)


@pytest.mark.parametrize("name", SHARED)
def test_losses_and_gradients_are_those_of_trl(name):
    smoothing = 0.1 if name in SMOOTHED else 0.0
    want = of_trl(name, label_smoothing=smoothing)
    check(ours(name, label_smoothing=smoothing), want)


@functools.cache
def ours_under(divergence):
    """{loss: (value, gradient)} of all that go with a divergence, by one program."""
    alpha = {"divergence_alpha": COEFFICIENT} if divergence == "alpha" else {}

    def values(policy):
        tokens = dataclasses.replace(NEAR, policy=policy)
        found = {}
        for name in WITH_DIVERGENCE:
            smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
            options = {"loss": name, "divergence": divergence} | smoothing | alpha
            config = PreferenceConfig(beta=BETA, **options)
            found[name] = preference_losses(tokens, config)[name].mean()
        return found

    run = jax.jit(lambda policy: (values(policy), jax.jacrev(values)(policy)))
    each, gradients = run(NEAR.policy)
    return {name: (each[name], gradients[name]) for name in each}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_divergences_are_those_of_trl(name, divergence):
    smoothing = 0.1 if name in SMOOTHED else 0.0
    want = of_trl(
        name, NEAR, label_smoothing=smoothing, f_divergence_type=divergence,
        f_alpha_divergence_coef=COEFFICIENT,
    )  # fmt: skip
    got = ours_under(DIVERGENCES[divergence])
    check(got[name], want)
    if name != "sft":  # the divergence is no option without an effect
        assert abs(got[name][0] - ours_under("reverse_kl")[name][0]) > 2e-4


def test_losses_that_trl_refuses_with_a_divergence_are_refused():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.DPOTrainer.__init__)
    taken = ast.literal_eval(re.search(r"f_divergence_loss_types = (\{.*?\})", source, re.S)[1])
    assert taken == set(WITH_DIVERGENCE)
    for name in sorted(set(SHARED) - taken):
        smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
        for divergence in DIVERGENCES.values():
            with pytest.raises(ValueError, match=f"{name} is defined for reverse_kl only"):
                PreferenceConfig(beta=BETA, loss=name, divergence=divergence, **smoothing)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "ipo"])
def test_length_desensitised_and_weighted_losses_are_those_of_trl(name):
    check(ours(name, ld_alpha=0.4), of_trl(name, ld_alpha=0.4))
    check(ours(name, wpo=True), of_trl(name, use_weighting=True))


def simpo_of_trl(chosen, rejected):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = types.SimpleNamespace(
        alpha=0.0, beta=BETA, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
    )  # fmt: skip
    return cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()


def orpo_of_trl(chosen, rejected):
    """What ORPO's loss subtracts, by TRL's `beta` (the paper's lambda), which is a weight here."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = types.SimpleNamespace(beta=1.0, accelerator=types.SimpleNamespace(device="cpu"))
    return -orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [("simpo", simpo_of_trl, {"simpo_gamma": 0.7}), ("orpo", orpo_of_trl, {})],
)
def test_losses_without_a_reference_are_those_of_trl(name, theirs, options):
    """Both read the mean log-probability of an answer's tokens, as TRL's trainers hand it over."""
    torch = pytest.importorskip("torch")
    weights = torch.tensor(np.array(PAIRS.weights))
    policy = torch.tensor(np.array(PAIRS.policy), requires_grad=True)
    means = (policy * weights).sum(-1) / weights.sum(-1)
    value = theirs(means[:, 0], means[:, 1])
    value.backward()
    check(ours(name, **options), (value.item(), policy.grad.numpy()))


def test_wpo_weights_no_loss_that_is_not_of_one_pair():
    """TRL refuses sorted pairs as we do. Its `sft` is one number, repeated for every pair, which it
    cannot multiply in place; ours keeps its weight."""
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.DPOTrainer.__init__)
    refused = re.search(r"use_weighting and any\(loss_type in (\{.*?\})", source, re.S)[1]
    assert ast.literal_eval(refused) == {"aot", "aot_unpaired"}
    for name in ("aot", "aot_unpaired"):
        with pytest.raises(ValueError, match=f"wpo=True: {name} sorts the batch"):
            PreferenceConfig(beta=BETA, loss=name, wpo=True)
    with pytest.raises(RuntimeError, match="written-to tensor"):
        of_trl("sft", use_weighting=True)


def test_exponents_are_clamped_where_trl_clamps_them():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    clamp = re.search(r"clamp_max = \{.*torch\.float32: ([\d.]+)", source)[1]
    assert float(clamp) == LARGEST_EXPONENT


def test_trl_has_no_loss_that_we_lack():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known == set(SHARED)
