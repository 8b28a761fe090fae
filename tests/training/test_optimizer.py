"""Groups, schedule, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from fake_batches import HEADS, micro

from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.optimizer import (
    MUON_RMS,
    SCHEDULES,
    OptimizerConfig,
    assign_groups,
    decay_mask,
    make_optimizer,
    warmup_decay,
)
from tpo_jax.training.state import init_state, merge, partition

PLAIN = {"name": "adamw", "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0, "min_lr_ratio": 1.0}
PARAMS = {
    "language": {"lm_head": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(2)}},
    "heads": {"region": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}},
    "vision": {"kernel": jnp.ones((2, 2))},
}


def update(optimizer, params, grads):
    trainable, _ = partition(params, optimizer.learning_rates)
    state = optimizer.transform.init(trainable)
    updates, _ = optimizer.transform.update(
        partition(grads, optimizer.learning_rates)[0], state, trainable
    )
    return flatten(updates)


def test_first_matching_group_decides_the_learning_rate_and_the_rest_is_frozen():
    groups = [("heads/.*bias", 1e-3), ("heads/", 1e-2), ("language/lm_head", 1e-4)]
    optimizer = make_optimizer(OptimizerConfig(**PLAIN), groups, 10, PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    moved = {path: float(-x.ravel()[0]) for path, x in update(optimizer, PARAMS, grads).items()}
    # Adam's first step is the sign of the gradient.
    assert moved == pytest.approx(
        {"heads/region/bias": 1e-3, "heads/region/kernel": 1e-2, "language/lm_head/kernel": 1e-4},
        rel=1e-5,
    )
    state = init_state(PARAMS, optimizer.transform, optimizer.learning_rates)
    kept = "\n".join(flatten(state.opt_state))
    assert "lm_head" in kept and "vision" not in kept and "norm" not in kept


def test_report_counts_leaves_and_parameters():
    optimizer = make_optimizer(OptimizerConfig(**PLAIN), [("heads/", 1e-2)], 10, PARAMS)
    rows = [line.split() for line in optimizer.report.splitlines()]
    assert rows[1:] == [["heads/", "0.01", "2", "6"], ["(frozen)", "0", "3", "12"]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("head/", 1e-2)], r"trainable\[0\]='head/' matches no parameter.*heads/region"),
        ([("region", 1e-2)], "matches no parameter"),  # patterns start at the root
        ([("heads/", 1e-2), ("heads/region", 1e-3)], r"trainable\[1\].*narrower pattern first"),
        ([("heads/(", 1e-2)], r"trainable\[0\]='heads/\(': not a regex"),
        ([], "nothing to train"),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**PLAIN), groups, 10, PARAMS)


@pytest.mark.parametrize(
    ("decay", "quarter"),
    [("cosine", (1 + np.cos(np.pi * 23 / 91)) / 2), ("linear", 1 - 23 / 91)],
)
def test_schedule_rises_then_falls_to_the_floor(decay, quarter):
    schedule = warmup_decay(100, 0.1, 0.2, decay)
    rates = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert np.all(np.diff(rates[9:]) < 0)
    # a quarter of the way from the peak (step 9) to the floor (step 100)
    np.testing.assert_allclose([rates[32], rates[100]], [0.2 + 0.8 * quarter, 0.2], rtol=1e-4)


@pytest.mark.parametrize("decay", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (3, 0.5), (10, 1.0)])
def test_schedule_of_short_runs_is_finite_and_positive(steps, warmup, decay):
    schedule = warmup_decay(steps, warmup, 0.1, decay)
    rates = [float(schedule(step)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_decay_reaches_matrices_only():
    params = FunctionalModel(micro(HEADS)).abstract()
    kept = {path for path, decays in flatten(decay_mask(params)).items() if decays}
    assert kept and all(path.endswith("/kernel") for path in kept)
    assert {p for p in flatten(params) if p.endswith("kernel")} == kept


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    config = OptimizerConfig(**PLAIN | {"weight_decay": 0.1})
    optimizer = make_optimizer(config, [("heads/", 1e-2)], 10, PARAMS)
    updates = update(optimizer, PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["heads/region/kernel"], -1e-2 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["heads/region/bias"], 0.0)


def test_clipping_sees_trainable_gradients_only():
    """With b1 = 0 and an eps that dwarfs it, Adam's update is proportional to the gradient."""
    config = OptimizerConfig(**PLAIN | {"clip": 1.0, "b1": 0.0, "eps": 1e6})
    optimizer = make_optimizer(config, [("heads/region/bias", 1.0)], 10, PARAMS)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS)
    updates = update(optimizer, PARAMS, grads)
    # norm of (3, 3) is sqrt(18): each becomes 1 / sqrt(2), whatever the frozen gradients are
    np.testing.assert_allclose(-1e6 * updates["heads/region/bias"], 2**-0.5, rtol=1e-5)


def test_equals_optax_adamw_for_one_group_without_mask():
    params = {"kernel": jnp.array([[1.0, -2.0]])}
    config = OptimizerConfig(
        name="adamw", warmup=0.0, weight_decay=0.1, clip=0.0, min_lr_ratio=0.0, schedule="linear",
        b2=0.9,
    )  # fmt: skip
    ours = make_optimizer(config, [("kernel", 0.05)], 10, params).transform
    theirs = optax.adamw(optax.linear_schedule(0.05, 0.0, 10), b2=0.9, weight_decay=0.1)
    got, want = params, params
    states = [ours.init(params), theirs.init(params)]
    for step in range(3):
        grads = {"kernel": jnp.array([[0.5, -1.0]]) * (step + 1)}
        updates, states[0] = ours.update(grads, states[0], got)
        got = optax.apply_updates(got, updates)
        updates, states[1] = theirs.update(grads, states[1], want)
        want = optax.apply_updates(want, updates)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-6)


def test_muon_orthogonalises_matrices_layer_by_layer_and_leaves_the_rest_to_adam():
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (3, 16, 64)  # three layers
    params = {
        "layers": {"kernel": jnp.zeros(shape), "bias": jnp.zeros((3, 64))},
        "embed": {"table": jnp.zeros((16, 64))},
        "lm_head": {"kernel": jnp.zeros((16, 64))},
    }
    config = OptimizerConfig(**PLAIN | {"name": "muon"})
    grads = jax.tree.map(lambda x: jax.random.normal(keys[0], x.shape), params)
    # One direction of the gradient dwarfs the others; the update must not follow it alone.
    grads["layers"]["kernel"] += 100 * jax.random.normal(keys[1], (3, 16, 1))
    updates = update(make_optimizer(config, [(".*", 1e-2)], 10, params), params, grads)
    for layer, gradient in zip(updates["layers/kernel"], grads["layers"]["kernel"], strict=True):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() < 3 * singular.min()  # Newton-Schulz is not exact
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(1e-2 * MUON_RMS, rel=0.2)
        assert np.sum(layer * gradient) < 0
    nadam = optax.scale_by_adam(nesterov=True)
    for path in ("layers/bias", "embed/table", "lm_head/kernel"):
        gradient = flatten(grads)[path]
        want, _ = nadam.update(gradient, nadam.init(gradient))
        np.testing.assert_allclose(updates[path], -1e-2 * want, rtol=1e-5)


def test_matrices_of_one_shape_are_orthogonalised_as_one_by_one():
    shapes = {"tall": (24, 8), "wide": (8, 24), "stacked": (2, 3, 8, 24), "square": (8, 8)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {
        name: {"kernel": jax.random.normal(key, shapes[name])}
        for name, key in zip(shapes, keys, strict=True)
    }
    axes = jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,)), params
    )
    theirs = optax.contrib.muon(1e-2, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    want, _ = theirs.update(grads, theirs.init(params), params)
    config = OptimizerConfig(**PLAIN | {"name": "muon"})
    got = update(make_optimizer(config, [(".*", 1e-2)], 10, params), params, grads)
    for path, expected in flatten(want).items():
        np.testing.assert_allclose(got[path], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("warmup", 1.5),
        ("min_lr_ratio", -0.1),
        ("clip", -1.0),
        ("schedule", "constant"),
        ("b1", -0.1),
        ("b2", 1.0),
        ("moments", "float16"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}={value!r}"):
        OptimizerConfig(**PLAIN | {field: value})


def test_partition_and_merge_are_inverse():
    trainable, frozen = partition(PARAMS, {"heads/region/bias", "vision/kernel"})
    assert sorted(flatten(trainable)) == ["heads/region/bias", "vision/kernel"]
    assert jax.tree.structure(merge(trainable, frozen)) == jax.tree.structure(PARAMS)
    with pytest.raises(ValueError, match="params/heads/nothing: a trainable path"):
        partition(PARAMS, {"heads/nothing"})
    with pytest.raises(ValueError, match="both trainable and frozen"):
        merge(trainable, PARAMS)


def test_assign_groups_leaves_unmatched_paths_out():
    assert assign_groups([("a/", 1.0), ("b", 2.0)], ["a/x", "b", "c/a/"]) == {"a/x": 0, "b": 1}
