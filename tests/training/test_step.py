"""The train step on the real micro model, on one device."""

import collections
import dataclasses
import functools
import itertools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import (
    HEAD_TERMS,
    HEADS,
    bucket,
    means,
    micro,
    pair_bucket,
    random_batch,
    small_params,
    train_config,
)

from tpo_jax.models.config import LoraConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten, unflatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.flops import forward_flops, matmul_flops, sub_programs
from tpo_jax.training.objective import SftObjective, denominators
from tpo_jax.training.optimizer import assign_groups
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.step import accumulate, row_keys

# A softmax over keys does not see what is added to all of them: no gradient but round-off.
NO_GRADIENT = "k_proj/bias"
B = 4
DEMO = pathlib.Path(__file__).resolve().parents[2] / "configs" / "demo.py"


@pytest.fixture(scope="module")
def host_params():
    """Parameters of the micro model with every head, as numpy."""
    params = FunctionalModel(micro(HEADS)).init(jax.random.key(1))
    return jax.tree.map(np.asarray, params)


def without_heads(params):
    return {name: params[name] for name in ("vision", "connector", "language")}


def select(params, program):
    """The parameters that the program's model has."""
    leaves = flatten(params)
    return unflatten({path: leaves[path] for path in flatten(program.abstract_state.params)})


PROGRAMS: dict[str, Program] = {}  # compiling costs most of the time: tests share what they can


def program_of(heads=(), **changes):
    name = repr((heads, changes))
    if name not in PROGRAMS:
        mesh = make_mesh({}, jax.devices()[:1])
        PROGRAMS[name] = make_program(train_config(heads, **changes), micro(heads), mesh)
    return PROGRAMS[name]


@functools.cache
def compile_step(program, shapes):
    leaves, structure = shapes
    return program.compile_train_step(jax.tree.unflatten(structure, leaves))


def run(program, params, batch, steps=1):
    """(state, metric means of every step)."""
    state, key = program.init_state(params), program.base_key(0)
    leaves, structure = jax.tree.flatten(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    )
    compiled = compile_step(program, (tuple(leaves), structure))
    history = []
    for _ in range(steps):
        state, metrics = compiled(state, batch, key)
        history.append(means(metrics))
    return state, history


def difference(a, b):
    a, b = flatten(a), flatten(b)
    return max(float(np.abs(np.asarray(a[path]) - np.asarray(b[path])).max()) for path in a)


def test_micro_batches_equal_one_batch_with_dropout_and_every_head(host_params):
    """Loss, terms and gradient; the update does not know of micro-batches."""
    batch = random_batch(bucket(B), micro(HEADS))
    found = {}
    for accumulation in (1, 2, 4):
        program = program_of(HEADS, dropout=0.2, accumulation=accumulation)
        state, key = program.init_state(host_params), program.base_key(0)
        for step in (0, 1):
            now = dataclasses.replace(state, step=jnp.full((), step, jnp.int32))
            found[accumulation, step] = program.train_step.gradient(now, batch, key)
    for accumulation, step in itertools.product((2, 4), (0, 1)):
        (whole, sums), (parts, added) = found[1, step], found[accumulation, step]
        assert {"language", "region/giou", "temporal/saliency", "mask/dice"} < set(sums)
        assert means(added) == pytest.approx(means(sums), rel=1e-4, abs=1e-5)
        size = max(float(np.abs(leaf).max()) for leaf in flatten(whole).values())
        still = {path for path, leaf in flatten(whole).items() if not np.any(leaf)}
        assert all(path.endswith(NO_GRADIENT) for path in still)
        assert difference(whole, parts) < 1e-5 * size < np.inf
    # Dropout was on: another step drops other things, and without it the loss is another one.
    first, second = (float(found[1, step][1]["language"].mean()) for step in (0, 1))
    without = program_of(HEADS).eval_step(state.params, batch)
    assert abs(first - second) > 1e-3
    assert abs(float(without["language"].mean()) - first) > 1e-3


def test_what_adapters_read_is_dropped_in_training_alone():
    lora = LoraConfig("language/layers/.*kernel", rank=2, alpha=4.0, dropout=0.5)
    config = dataclasses.replace(micro(), lora=lora)
    options = train_config(trainable=[[".*lora_", 1e-3]])
    program = make_program(options, config, make_mesh({}, jax.devices()[:1]))
    params = small_params(program.abstract_state.params, 0.3)
    batch = random_batch(bucket(B), config)
    _, (trained,) = run(program, params, batch)
    evaluated = program.eval_step(program.init_state(params).params, batch)
    assert abs(trained["language"] - float(evaluated["language"].mean())) > 1e-2


def test_denominators_do_not_run_the_model(host_params):
    """The compiler drops everything but the counting of labels."""
    program = program_of(HEADS)
    batch = random_batch(bucket(B), micro(HEADS))

    def weights(params, batch):
        return denominators(program.objective, program.model, params, batch, None)

    compiled = jax.jit(weights).lower(host_params, batch).compile()
    assert "dot(" not in compiled.as_text() and "while(" not in compiled.as_text()
    counted = compiled(host_params, batch)
    terms = program.eval_step(program.init_state(host_params).params, batch)
    for name, weight in counted.items():
        assert float(weight) == float(terms[name].weight), name
        assert float(weight) > 0, name


def demo_stage(stage):
    return runpy.run_path(str(DEMO))["get_config"](f"stage={stage}")


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_frozen_leaves_stay_bit_identical_and_all_others_move(host_params, stage):
    """What stages of the demo train, with their losses."""
    shipped = demo_stage(stage)
    batch = random_batch(bucket(B), micro(HEADS))
    program = program_of(HEADS, trainable=shipped.trainable, losses=shipped.losses)
    before = flatten(host_params)
    state, _ = run(program, host_params, batch)
    after = flatten(jax.tree.map(np.asarray, state.params))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    trained = set(assign_groups(shipped.trainable, list(before)))
    assert moved <= trained and all(path.endswith(NO_GRADIENT) for path in trained - moved)
    state_paths = "\n".join(flatten(state.opt_state))
    assert all(path in state_paths for path in trained)
    assert ("heads/region/" in state_paths) == (stage != "1")
    assert ("vision/" in state_paths) == ("connector/" in state_paths) == (stage == "3")
    assert stage != "3" or trained == set(before)


def test_overfits_one_batch(host_params):
    batch = random_batch(bucket(B), micro())
    _, history = run(program_of(steps=200), without_heads(host_params), batch, steps=120)
    assert history[0]["language"] > 5.0
    assert history[-1]["language"] < 0.1 and history[-1]["token_accuracy"] > 0.99


def test_preference_loss_starts_at_log_two_and_can_be_overfitted(host_params):
    config, groups = micro(), demo_stage("dpo").trainable
    batch = random_batch(pair_bucket(B), config)
    program = program_of(
        objective="preference", trainable=[[groups[0][0], 3e-3]],
        preference={"loss": "sigmoid", "beta": 0.3, "sft": 0.5},
    )  # fmt: skip
    params = program.init_state(without_heads(host_params)).params
    batch["reference_logps"] = np.asarray(program.score_step(params, batch))
    state, history = run(program, without_heads(host_params), batch, steps=15)
    assert history[0]["preference/sigmoid"] == pytest.approx(np.log(2), abs=1e-6)
    assert history[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    total = history[0]["preference/sigmoid"] + 0.5 * history[0]["preference/sft"]
    assert history[0]["loss"] == pytest.approx(total, rel=1e-6)
    before, after = flatten(params), flatten(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.startswith("language/")}
    assert history[-1]["preference/sigmoid"] < 0.1
    assert history[-1]["preference/accuracy"] == 1.0
    scores = program.score_step(state.params, batch)
    assert scores.shape == (B, 2, 5) and scores.dtype == jnp.float32


def test_a_term_of_weight_zero_is_reported_and_has_no_backward_pass():
    batch = random_batch(bucket(B), micro(HEADS))
    found = {}
    for weight in (0.0, 1.0):
        losses = {"language": 1.0} | dict.fromkeys(HEAD_TERMS, weight)
        program = program_of(HEADS, losses=losses)
        step = functools.partial(program.train_step.gradient, program.abstract_state, batch)
        found[weight] = matmul_flops(step, jax.random.key(0))
        assert set(HEAD_TERMS) < set(jax.eval_shape(step, jax.random.key(0))[1])
    heads = forward_flops(micro(HEADS), batch)["heads"]
    # A backward pass costs about twice the forward pass, which stays.
    assert found[1.0] - found[0.0] > 1.5 * heads


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing(host_params):
    params = without_heads(host_params)
    batch = random_batch(bucket(B), micro())
    batch["answer_weights"][0, 0, 0] = np.inf
    state, history = run(program_of(steps=200), params, batch)
    assert history[0]["nonfinite"] == 1.0 and int(state.step) == 1
    assert difference(state.params, params) == 0.0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.opt_state))


def products(jaxpr):
    """{dtype of the operands: matrix products} of a traced program, loops once."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[equation.invars[0].aval.dtype.name] += 1
        for inner in sub_programs(equation):
            found += products(inner)
    return found


def test_bfloat16_is_computed_in_and_weights_gradients_and_moments_are_float32():
    config, batch = micro(), random_batch(bucket(B), micro())
    found = {}
    for dtype in ("float32", "bfloat16"):
        program = make_program(
            train_config(), dataclasses.replace(config, dtype=dtype),
            make_mesh({}, jax.devices()[:1]),
        )  # fmt: skip
        state = program.abstract_state
        floats = [x for x in jax.tree.leaves((state.params, state.opt_state))
                  if jnp.issubdtype(x.dtype, jnp.floating)]  # fmt: skip
        assert {x.dtype.name for x in floats} == {"float32"}
        step = functools.partial(program.train_step.gradient, state, batch)
        trace, (gradients, _) = jax.make_jaxpr(step, return_shape=True)(jax.random.key(0))
        assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}
        found[dtype] = products(trace.jaxpr)
    assert found["float32"].keys() == {"float32"}
    assert found["bfloat16"]["bfloat16"] > 9 * found["bfloat16"]["float32"]


def test_terms_and_weights_must_name_each_other():
    scores = {"scores": type("S", (), {"logp": jnp.zeros((1, 1, 1))}), "heads": {}}
    batch = {"answer_weights": jnp.ones((1, 1, 1))}
    with pytest.raises(ValueError, match="config.losses has no weight for 'language'"):
        SftObjective({}).terms(scores, batch)
    with pytest.raises(ValueError, match=r"config.losses\['language/x'\] names no term"):
        SftObjective({"language": 1.0, "language/x": 1.0}).terms(scores, batch)


def test_preference_rows_without_reference_are_refused():
    batch = random_batch(pair_bucket(B), micro())
    del batch["reference_logps"]
    program = program_of(objective="preference")
    with pytest.raises(ValueError, match="batch/reference_logps is missing.*preferences score"):
        program.lower_gradient(batch)


def test_row_keys_depend_on_seed_step_and_example_only():
    ids = jnp.array([7, 2**32 - 1, 3], jnp.uint32)
    keys = jax.random.key_data(row_keys(jax.random.key(0), jnp.int32(5), ids))
    turned = jax.random.key_data(row_keys(jax.random.key(0), jnp.int32(5), ids[::-1]))
    np.testing.assert_array_equal(keys, turned[::-1])
    for other in (
        row_keys(jax.random.key(0), jnp.int32(6), ids),
        row_keys(jax.random.key(1), jnp.int32(5), ids),
    ):
        assert not np.any(np.all(keys == jax.random.key_data(other), axis=-1))


def test_accumulate_takes_every_row_once():
    rows = {"x": jnp.arange(6.0), "y": jnp.arange(12.0).reshape(6, 2)}

    def total(micro):
        assert micro["x"].shape == (2,)
        return WeightedSum(micro["x"].sum() + micro["y"].sum(), jnp.float32(2))

    got = accumulate(total, rows, 3)
    assert (float(got.total), float(got.weight)) == (15 + 66, 6)
    with pytest.raises(ValueError, match="accumulation=4 does not divide the 6 rows"):
        accumulate(total, rows, 4)
