"""What a run says about its tasks: examples seen, parts of the loss, sizes of gradients."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import (
    bucket,
    means,
    micro,
    pair_bucket,
    random_batch,
    small_params,
    train_config,
)

from tpo_jax import train
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.flops import forward_flops
from tpo_jax.training.program import make_program
from tpo_jax.training.state import merge, partition
from tpo_jax.training.tasks import (
    add_examples,
    count_examples,
    example_scalars,
    objective_parts,
    task_of,
    tasks_of,
)

HEADS = ("region_mlp", "temporal_mlp")
LOSSES = {
    "language": 2.0, "region_mlp/l1": 5.0, "region_mlp/giou": 0.0, "temporal_mlp/l1": 3.0,
    "temporal_mlp/giou": 1.0,
}  # fmt: skip
# Task, and what its terms begin with.
TASKS = {"language": "language", "region": "region_mlp", "temporal": "temporal_mlp"}


def test_losses_belong_to_the_tasks_of_their_heads():
    owners = {"language": "language", "cg_detr/l1": "temporal", "region_mlp/giou": "region",
              "sam2/still_dice": "mask", "preference/sft": "preference"}  # fmt: skip
    assert {term: task_of(term) for term in owners} == owners
    assert tasks_of({"language": 1.0, "sam2/iou": 0.0, "cg_detr/l1": 1.0, "cg_detr/giou": 1.0}) == (
        "language", "temporal",
    )  # fmt: skip


def test_examples_are_counted_by_task_and_added_up():
    tasks = jnp.array([[1, 2, 0], [2, 2, 5], [0, 0, 0]], jnp.int32)
    counts = np.asarray(count_examples({"branch_tasks": tasks}))
    seen = add_examples({"region": 4}, counts)
    assert seen == {"region": 4, "conversation": 1, "temporal": 3, "tracking": 1}
    assert json.loads(json.dumps(seen)) == seen  # goes into a checkpoint
    assert add_examples(seen, np.zeros_like(counts)) == seen
    assert example_scalars(seen)["train/examples/temporal"] == 3


def test_parts_by_hand():
    weights = {"language": 1.0, "cg_detr/l1": 10.0, "cg_detr/giou": 1.0, "sam2/iou": 0.0}
    weighted = {"language": jnp.float32(2.0), "cg_detr/l1": jnp.float32(3.0)}
    parts = objective_parts(weights, weighted)
    assert {name: (float(p.total), float(p.weight)) for name, p in parts.items()} == {
        "objective/language": (2.0, 1.0), "objective/temporal": (3.0, 1.0),
        "objective/cg_detr/l1": (3.0, 1.0), "objective/cg_detr/giou": (0.0, 1.0),
    }  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return small_params(FunctionalModel(micro(HEADS)).abstract(), size=0.1)


@functools.cache
def program_of(accumulation):
    config = train_config(
        HEADS, losses=LOSSES, task_gradients_every=1, accumulation=accumulation,
        # What all tasks share is what the backward pass meets first, and is done with soon.
        trainable=[["heads/", 1e-2], ["language/(final_norm|lm_head)", 1e-3]],
    )  # fmt: skip
    return make_program(config, micro(HEADS), make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def batch():
    return random_batch(bucket(4), micro(HEADS))


@pytest.fixture(scope="module")
def rows(batch):
    """The first of two micro-batches."""
    return jax.tree.map(lambda x: x[::2], batch)


@pytest.fixture(scope="module")
def one_step(params, rows):
    """({path: gradient}, sums) of a step that is this micro-batch alone."""
    program = program_of(1)
    state, key = program.init_state(params), program.base_key(0)
    gradients, sums = program.train_step.gradient(state, rows, key)
    return flatten(gradients), sums


def measure(program, params, batch):
    step = jnp.zeros((), jnp.int32)
    return means(program.task_gradients(params, step, batch, program.base_key(0)))


def test_parts_of_a_step_add_up_to_its_loss(one_step):
    _, sums = one_step
    # Rows 0 and 2 of [[0, 1], [2, 3], [0, 1], [2, 3]]; 0 is no task, 1 is conversation.
    assert np.asarray(sums["examples"]).tolist() == [2] + [0] * (len(sums["examples"]) - 1)
    found = means(sums)
    span = 3 * found["temporal_mlp/l1"]
    assert found["objective/temporal_mlp/l1"] == pytest.approx(span, rel=1e-6)
    temporal = span + found["temporal_mlp/giou"]
    assert found["objective/temporal"] == pytest.approx(temporal, rel=1e-6)
    assert "objective/region_mlp/giou" not in found and found["region_mlp/giou"] > 0
    tasks = [found[f"objective/{task}"] for task in TASKS]
    assert min(tasks) > 0 and sum(tasks) == pytest.approx(found["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def by_hand(params, rows):
    """{task: {path: gradient}}: the terms of a task written out, and differentiated alone."""
    program = program_of(1)
    trainable, frozen = partition(params, program.trainable)

    def loss(trainable, frozen, rows, owner):
        model = program.model.bind(merge(trainable, frozen))
        terms = program.objective.terms(program.objective.predict(model, rows, None), rows)
        named = {n: t for n, t in terms.items() if n.split("/")[0] == owner}
        return sum(LOSSES[name] * term.total / term.weight for name, term in named.items())

    @jax.jit
    def gradients(*args):
        return {task: jax.grad(loss)(*args, owner) for task, owner in TASKS.items()}

    return {task: flatten(g) for task, g in gradients(trainable, frozen, rows).items()}


def test_gradient_shares_are_those_of_jax_grad(params, batch, rows, by_hand, one_step):
    norm, shared = {}, {}
    for task, leaves in by_hand.items():
        square = {path: float(jnp.sum(g**2)) for path, g in leaves.items()}
        norm[task] = sum(square.values()) ** 0.5
        shared[task] = sum(v for p, v in square.items() if not p.startswith("heads/")) ** 0.5
    expected = {f"gradient_norm/{task}": value for task, value in norm.items()}
    for name, norms in (("gradient_share", norm), ("shared_gradient_share", shared)):
        expected |= {f"{name}/{task}": norms[task] / sum(norms.values()) for task in norms}
    assert min(expected.values()) > 0
    assert measure(program_of(1), params, rows) == pytest.approx(expected, rel=1e-4)
    # Of several micro-batches the first is measured.
    assert measure(program_of(2), params, batch) == pytest.approx(expected, rel=1e-4)
    for path, whole in one_step[0].items():
        added = sum(leaves[path] for leaves in by_hand.values())
        np.testing.assert_allclose(added, whole, rtol=1e-3, atol=1e-5, err_msg=path)


def test_a_task_without_labels_has_no_share_of_the_gradient(params, rows):
    blank = jax.tree.map(np.array, rows)
    blank["slots"]["region"]["valid"][:] = False
    found = measure(program_of(1), params, blank)
    assert found["gradient_norm/region"] == found["gradient_share/region"] == 0.0
    assert found["gradient_share/language"] + found["gradient_share/temporal"] == pytest.approx(1)


def test_the_program_is_made_only_where_it_is_asked_for():
    config = train_config(HEADS, losses=LOSSES)
    program = make_program(config, micro(HEADS), make_mesh({}, jax.devices()[:1]))
    assert config.task_gradients_every == 0 and program.task_gradients is None


def test_preferences_are_one_task():
    config = train_config(
        objective="preference", preference={"loss": "sigmoid", "beta": 0.3, "sft": 0.5},
        task_gradients_every=1,
    )  # fmt: skip
    program = make_program(config, micro(), make_mesh({}, jax.devices()[:1]))
    state, key = program.abstract_state, jax.random.key(0)
    pairs = random_batch(pair_bucket(4), micro())
    _, sums = jax.eval_shape(program.train_step.gradient, state, pairs, key)
    assert {name for name in sums if name.startswith("objective/")} == {
        "objective/preference", "objective/preference/sigmoid", "objective/preference/sft",
    }  # fmt: skip
    found = jax.eval_shape(program.task_gradients, state.params, state.step, pairs, key)
    assert set(found) == {"gradient_norm/preference", "gradient_share/preference",
                          "shared_gradient_share/preference"}  # fmt: skip


def test_an_idle_head_does_not_run(params):
    """Its losses are not there; the other's are what they were; its part of the loss is 0."""
    program, config = program_of(1), micro(HEADS)
    shapes = bucket(2, slots={"region": 2}, idle=("temporal",))
    spec = batch_spec(shapes, config)
    assert spec["slots"]["temporal"]["valid"].shape == (2, 0)
    key = jax.eval_shape(jax.random.key, 0)
    _, sums = jax.eval_shape(program.train_step.gradient, program.abstract_state, spec, key)
    assert {"region_mlp/l1", "objective/temporal", "objective/temporal_mlp/l1"} < set(sums)
    assert not any(name.startswith("temporal_mlp/") for name in sums)
    heads = {name: forward_flops(config, batch_spec(b, config))["heads"]
             for name, b in {"all": bucket(2), "idle": shapes}.items()}  # fmt: skip
    assert 0 < heads["idle"] < heads["all"]


def test_validation_adds_up_what_not_every_bucket_has(monkeypatch):
    """Losses 1 and 3 of two batches in the language, 4 of one in a head that the last lacks."""
    one = jnp.float32(1.0)

    def bucket_that_gives(**terms):
        terms = {name.replace("_", "/"): WeightedSum(one * v, one) for name, v in terms.items()}
        return types.SimpleNamespace(evaluate=lambda params, batch: terms)

    compiled = {"both": bucket_that_gives(language=1, region_l1=4),
                "words": bucket_that_gives(language=3)}  # fmt: skip
    monkeypatch.setattr(train, "global_batch", lambda local, mesh: local)
    found = train.evaluate(
        types.SimpleNamespace(
            eval_batches=2, data=types.SimpleNamespace(threads=1)),
        types.SimpleNamespace(
            mesh=None, objective=types.SimpleNamespace(
                weights={"language": 1.0, "region/l1": 0.5, "mask/dice": 1.0})),
        compiled,
        types.SimpleNamespace(iterator=lambda threads: iter([("both", {}), ("words", {})])),
        None,
        types.SimpleNamespace(reached=lambda: False),
    )  # fmt: skip
    assert found == {"validation/language": 2.0, "validation/region/l1": 4.0,
                     "validation/loss": 2.0 + 0.5 * 4.0}  # fmt: skip
