"""Adam's moments in bfloat16 and in the memory of the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.rules import place
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from tpo_jax.training.estimate import chip_bytes
from tpo_jax.training.moments import in_bfloat16, round_at_random
from tpo_jax.training.optimizer import OptimizerConfig, make_optimizer
from tpo_jax.training.program import make_abstract_state
from tpo_jax.training.save_policy import Save, SavePolicy
from tpo_jax.training.state import TrainState, partition
from tpo_jax.training.step import jit_train_step, make_update_step

PLAIN = {"name": "adamw", "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0, "min_lr_ratio": 1.0}
STEPS = 20
SHAPES = {
    "language": {"layers": {"q_proj": {"kernel": (2, 16, 16)}}, "norm": {"scale": (16,)}},
    "vision": {"kernel": (4, 4)},
}
NUMBERS = 2 * 16 * 16 + 16  # that are trained


def draw(seed):
    random = np.random.default_rng(seed)
    make = lambda shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def quadratic_step(state, batch, key):
    """Half the squared distance to a point, and its gradient."""
    del batch, key
    trained, there = {"language": state.params["language"]}, {"language": draw(1)["language"]}
    apart = jax.tree.map(jnp.subtract, trained, there)
    loss = sum(jnp.sum(x**2) / 2 for x in jax.tree.leaves(apart))
    return apart, {"loss": WeightedSum(loss, jnp.float32(1.0))}


@functools.cache
def trained(moments):
    """(abstract state, last state, losses) of STEPS steps on two devices."""
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    config = OptimizerConfig(**PLAIN | {"moments": moments})
    optimizer = make_optimizer(config, [("language/", 0.05)], STEPS, draw(0))
    abstract = make_abstract_state(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), draw(0)), optimizer, mesh
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    trainable = frozenset(optimizer.learning_rates)
    gradients, _ = partition(shardings.params, trainable)
    step = jit_train_step(quadratic_step, make_update_step(optimizer), mesh, shardings, gradients)
    params = place(draw(0), shardings.params)
    start = jax.jit(
        lambda p: optimizer.transform.init(partition(p, trainable)[0]),
        out_shardings=shardings.opt_state,
    )
    state = TrainState(place(np.zeros((), np.int32), shardings.step), params, start(params))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, {"rows": np.zeros(2, np.float32)}, jax.random.key(0))
        losses.append(float(metrics["loss"].mean()))
    return abstract, state, losses


def floats(state):
    return [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]


def test_bfloat16_takes_half_the_memory_and_learns_the_same():
    (_, usual, losses), (_, half, close) = trained("float32"), trained("bfloat16")
    assert sum(x.nbytes for x in floats(usual)) == 2 * 4 * NUMBERS
    assert sum(x.nbytes for x in floats(half)) == 2 * 2 * NUMBERS
    assert {x.dtype.name for x in floats(half)} == {"bfloat16"}
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(close, losses, rtol=0.01)
    assert close != losses


def test_the_host_keeps_the_moments_and_nothing_else_changes():
    (abstract, usual, losses), (away, host, same) = trained("float32"), trained("host")
    assert same == losses
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(usual), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {x.sharding.memory_kind for x in floats(host)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(host.params)} == {"device"}
    # A device has half of the kernel, and all of the scale.
    assert chip_bytes(abstract) - chip_bytes(away) == 2 * 4 * (16 * 16 + 16)


@pytest.mark.parametrize("moments", ["bfloat16", "host"])
def test_a_checkpoint_comes_back_as_it_was_stored(tmp_path, moments):
    abstract, state, _ = trained(moments)
    checkpoints = Checkpoints(tmp_path, SavePolicy(every=1, keep=1))
    unit = Checkpoint(state, {}, {}, {}, {}, {})
    checkpoints.save(STEPS, unit, Save(("step",)))
    checkpoints.wait()
    restored = checkpoints.restore(STEPS, abstract).state
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
        assert (got.dtype, got.sharding) == (want.dtype, want.sharding)
    if moments == "bfloat16":
        with pytest.raises(CheckpointError, match="opt_state/1/mu.*: not in the checkpoint"):
            checkpoints.restore(STEPS, trained("float32")[0])
    checkpoints.close()


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    exact = np.float32([0.0, -1.5, 2**-126, np.inf])
    between = np.full(20_000, 1 + 2**-9, np.float32)  # a quarter of the way to 1's neighbour
    rounded = jax.jit(round_at_random)(np.concatenate([exact, between]), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    found = np.asarray(rounded, np.float32)
    np.testing.assert_array_equal(found[:4], exact)
    assert set(np.unique(found[4:])) == {1.0, 1 + 2**-7}
    assert found[4:].mean() == pytest.approx(1 + 2**-9, abs=1e-4)


def test_a_second_moment_does_not_stand_still():
    """700 steps with gradient 1 and 700 without: rounded to the nearest it would stop at 0.25."""
    rule = in_bfloat16(optax.scale_by_adam())

    @jax.jit
    def run(gradients):
        def step(state, gradient):
            _, state = rule.update(jnp.full(512, gradient), state)
            return state, jnp.mean(state.moments.nu.astype(jnp.float32))

        return jax.lax.scan(step, rule.init(jnp.zeros(512)), gradients)[1]

    means = run(jnp.repeat(jnp.array([1.0, 0.0]), 700))
    assert float(means[699]) == pytest.approx(1 - 0.999**700, rel=0.02)
    assert float(means[-1]) == pytest.approx((1 - 0.999**700) * 0.999**700, rel=0.03)
