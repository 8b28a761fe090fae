"""The preference objective on the micro model: contrast frames, LoRA switched off, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import micro, pair_bucket, random_batch, train_config

from tpo_jax.data.rows import CONTRAST_FIELDS, kind_id
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.objectives.preference import PreferenceConfig
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten, map_with_path
from tpo_jax.training.objective import (
    PreferenceObjective,
    answer_hidden,
    padding,
    without_adapters,
)
from tpo_jax.training.program import make_program

B = 4
# The output table has adapters too: the reference's is another one.
LORA = LoraConfig(pattern="language/.*(q_proj|v_proj|lm_head)/kernel", rank=2, alpha=8.0)


@pytest.fixture(scope="module")
def model():
    return FunctionalModel(dataclasses.replace(micro(), lora=LORA))


@pytest.fixture(scope="module")
def params(model):
    # Drawn by NumPy: compiling the initialisers takes longer than the test.
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith(("bias", "lora_b")):
            return np.zeros(leaf.shape, np.float32)
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
        ones = path.endswith("scale")
        return np.ones(leaf.shape, np.float32) if ones else np.float32(
            scale * rng.normal(size=leaf.shape))  # fmt: skip

    return map_with_path(draw, model.abstract())


@pytest.fixture(scope="module")
def batch():
    """A batch of pairs with everything that an objective may read."""
    batch = random_batch(pair_bucket(B), micro())
    other = random_batch(pair_bucket(B), micro(), seed=1)
    # The times of its frames take three tokens less to tell.
    for name in ("positions", "segments"):
        other[f"prefix_{name}"][:, -3:] = 0
    batch |= {f"contrast_{name}": other[name] for name in CONTRAST_FIELDS}
    batch["reference_contrast_logps"] = other["reference_logps"][:, 0]
    batch["pair_kind"] = np.full(B, kind_id("order"), np.uint32)
    batch["pair_duration"] = np.array([30.0, 30, 90, 90], np.float32)
    return batch


def compiled(objective, model):
    """Function of (params, batch) -> (terms and metrics as means, predictions)."""

    @jax.jit
    def step(params, batch):
        predictions = objective.predict(model.bind(params), batch, None)
        sums = objective.terms(predictions, batch) | objective.metrics(predictions, batch)
        return sums, predictions

    def run(params, batch):
        sums, predictions = step(params, batch)
        return {name: float(x.mean()) for name, x in sums.items()}, predictions

    return run


def moved(params):
    """The same with adapters that do something, to the output table as well, which does not move
    where all tokens gain the same."""
    rng = np.random.default_rng(2)

    def move(path, x):
        moves = path.endswith("lora_b")
        return x + np.float32(0.5 * rng.normal(size=x.shape)) if moves else x

    return map_with_path(move, params)


def test_contrast_and_adapters_off_score_what_they_say(model, params, batch):
    """Conditional loss, reference without LoRA, WPO's statistics and groups, in one program."""
    losses = ["sigmoid", "conditional", "anchor"]
    kinds = ("order", "action")
    config = PreferenceConfig(beta=0.3, loss=losses, sft=0.5, wpo=True, kinds=kinds)
    run = compiled(PreferenceObjective(config, "adapters_off"), model)
    without = {k: v for k, v in batch.items() if not k.startswith("reference_")}
    # New adapters change nothing: the policy is the reference.
    means, at_start = run(params, without)
    np.testing.assert_allclose(at_start.reference, at_start.tokens.logp, atol=1e-5)
    for name in ("margin", "contrast_margin", "chosen_drift", "kl_per_token"):
        assert means[f"preference/{name}"] == pytest.approx(0, abs=1e-5)
    # Adapters that moved leave the reference where it was.
    means, later = run(moved(params), without)
    np.testing.assert_allclose(later.reference, at_start.reference, atol=1e-5)
    np.testing.assert_allclose(later.contrast_reference, at_start.contrast_reference, atol=1e-5)
    assert np.abs(later.tokens.logp - at_start.tokens.logp).max() > 1e-2
    # The contrast is the chosen answer about the other clip, behind a prefix that is shorter.
    clip = {name: batch[f"contrast_{name}"] for name in CONTRAST_FIELDS}
    clip["branch_positions"] = batch["branch_positions"] - 3
    _, other = run(moved(params), without | clip)
    np.testing.assert_allclose(later.contrast, other.tokens.logp[:, :1], atol=1e-5)
    assert np.abs(later.contrast - later.tokens.logp[:, :1]).max() > 1e-3
    assert means["preference/kind/order/margin"] == pytest.approx(means["preference/margin"])
    assert means["preference/duration/1_to_3_min/margin"] != means["preference/margin"]
    assert "preference/kind/action/accuracy" in means
    assert means["preference/sigmoid"] > 0 and means["preference/conditional"] > 0


def separate_rows(batch):
    """Chosen and rejected answers in rows of their own: [B, K, ...] -> [B * K, 1, ...]."""
    split = {
        name: x.reshape(-1, 1, *x.shape[2:]) for name, x in batch.items()
        if name.startswith(("branch_", "answer_"))
    }  # fmt: skip
    shared = {
        name: np.repeat(x, 2, axis=0) for name, x in batch.items()
        if name.startswith(("frame", "prefix_"))
    }  # fmt: skip
    return batch | split | shared


def test_the_kl_of_rrpo_is_that_of_dense_logits_on_separate_rows(model, params, batch):
    """Of the loss over shared prefixes, and of its gradient by every adapter."""
    config = PreferenceConfig(beta=0.3, loss={"vocabulary_kl": 1.0, "sigmoid": 0.0})
    objective = PreferenceObjective(config, "adapters_off")
    batch = {k: v for k, v in batch.items() if not k.startswith(("reference_", "contrast_"))}

    def loss(params):
        predictions = objective.predict(model.bind(params), batch, None)
        sums = objective.terms(predictions, batch) | objective.metrics(predictions, batch)
        means = {name: x.mean() for name, x in sums.items()}
        return means["preference/vocabulary_kl"], (means, predictions)

    def dense(params):
        rows = separate_rows(batch)
        policy = model.bind(params)

        def logps(model):
            hidden = answer_hidden(model(rows, None), rows)
            logits = hidden @ model.language.table.T
            return jax.nn.log_softmax(logits[..., : model.language.config.num_tokens])

        there, here = jax.lax.stop_gradient(logps(without_adapters(policy))), logps(policy)
        kl = (jnp.exp(there) * (there - here)).sum(-1).reshape(batch["answer_weights"].shape)
        counted = kl * batch["answer_weights"] * batch["pair_valid"][:, None, None]
        return counted[:, 0].sum() / batch["pair_valid"].sum(), (counted, there)

    step, oracle = (jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (loss, dense))
    (value, (means, at_start)), _ = step(params)
    assert value == pytest.approx(0, abs=1e-5)
    (value, (means, later)), gradient = step(moved(params))
    (want, (kl, there)), wanted = oracle(moved(params))
    assert value == pytest.approx(float(want), rel=1e-5) and want > 0.1
    tokens = batch["answer_weights"] * batch["pair_valid"][:, None, None]
    per_token = float(kl.sum() / tokens.sum())
    assert means["preference/vocabulary_kl_per_token"] == pytest.approx(per_token, rel=1e-5)
    assert means["preference/kl_per_token"] != pytest.approx(per_token, rel=0.1)  # an estimate
    told = jnp.take_along_axis(
        there.reshape(*tokens.shape, -1), batch["answer_tokens"][..., None], -1
    )
    np.testing.assert_allclose(later.reference, told[..., 0], atol=1e-4)
    np.testing.assert_allclose(later.reference, at_start.reference, atol=1e-5)
    leaves = flatten(gradient)
    for path, leaf in flatten(wanted).items():
        if path.endswith(("lora_a", "lora_b")):
            largest = float(jnp.abs(leaf).max())
            assert largest > 1e-4, path
            np.testing.assert_allclose(
                leaves[path], leaf, rtol=0, atol=1e-4 * largest, err_msg=path
            )


def test_the_kl_of_rrpo_is_refused_without_the_reference_in_the_step(model, params, batch):
    objective = PreferenceObjective(PreferenceConfig(beta=0.3, loss="vocabulary_kl"))
    expected = "reference='sidecar'.*'vocabulary_kl' reads.*adapters_off.*'chosen_kl'"
    with pytest.raises(ValueError, match=expected):
        objective.predict(model.bind(params), batch, None)


def test_padding_is_the_share_of_empty_positions(model, params, batch):
    batch = batch | {"branch_segments": batch["branch_segments"].copy()}
    batch["branch_segments"][:, 1, 5:] = 0
    objective = PreferenceObjective(PreferenceConfig(beta=0.3, loss="simpo"))
    shapes = jax.eval_shape(lambda: objective.metrics(
        objective.predict(model.bind(params), batch, None), batch))  # fmt: skip
    assert not any("margin" in name or "drift" in name for name in shapes)  # no reference, no claim
    positions = B * (batch["prefix_tokens"].shape[1] + 2 * 10)
    got = padding(batch)
    assert float(got.total) == B * 5 and float(got.weight) == positions


def test_missing_contrast_names_the_fields(model, params, batch):
    objective = PreferenceObjective(PreferenceConfig(beta=0.3, loss="conditional"))
    without = {k: v for k, v in batch.items() if k != "contrast_frames"}
    with pytest.raises(ValueError, match="batch/contrast_frames missing.*'conditional'"):
        objective.predict(model.bind(params), without, None)


def test_adapters_off_is_refused_where_it_is_not_the_reference():
    mesh = make_mesh({}, jax.devices()[:1])
    config = train_config(objective="preference", trainable=[["language/|connector/", 1e-3]])
    config.preference.reference = "adapters_off"
    with pytest.raises(ValueError, match="adapters_off.*no LoRA to switch off; set config.lora"):
        make_program(config, micro(), mesh)
    with_lora = dataclasses.replace(micro(), lora=LORA)
    with pytest.raises(ValueError, match=r"adapters_off.*connector/\S+ is trained.*freeze them"):
        make_program(config, with_lora, mesh)
    config.trainable = [[".*lora_", 1e-3]]
    make_program(config, with_lora, mesh)
