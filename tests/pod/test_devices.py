"""Eight devices against one: same losses and parameters, whatever the mesh.

The devices are fake ones of this host (see tests/conftest.py); the programs are partitioned as on
a pod.
"""

import dataclasses

import jax
import numpy as np
import pytest
from fake_batches import (
    HEADS,
    SMOOTH,
    bucket,
    means,
    micro,
    random_batch,
    small_params,
    train_config,
)

from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import global_batch, make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.program import make_program


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
    if jax.device_count() < 8:
        pytest.fail(f"got {jax.device_count()} devices; see XLA_FLAGS in tests/conftest.py")


def two_steps(heads, sizes, devices, accumulation=1, optimizer="adamw"):
    """(metrics of both steps, parameters after them as {path: numpy})."""
    config = micro(heads)
    params = jax.tree.map(np.asarray, FunctionalModel(config).init(jax.random.key(1)))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    options = train_config(heads, dropout=0.1, optimizer=SMOOTH | {"name": optimizer},
                           accumulation=accumulation)
    program = make_program(options, config, mesh)
    local = random_batch(bucket(8), config)
    compiled = program.compile_train_step(local)
    batch, state, key = global_batch(local, mesh), program.init_state(params), program.base_key(0)
    history = []
    for _ in range(2):
        state, metrics = compiled(state, batch, key)
        history.append(means(metrics))
    wanted = flatten(program.abstract_state)
    for path, x in flatten(state).items():
        assert x.sharding.is_equivalent_to(wanted[path].sharding, x.ndim), path
    return history, flatten(jax.tree.map(np.asarray, state.params))


@pytest.fixture(scope="module")
def one_device():
    results = {}

    def get(heads, optimizer):
        if (heads, optimizer) not in results:
            results[heads, optimizer] = two_steps(heads, {}, 1, optimizer=optimizer)
        return results[heads, optimizer]

    return get


@pytest.mark.parametrize(
    ("heads", "sizes", "accumulation", "optimizer"),
    [
        ((), {"data": 8}, 1, "adamw"),
        ((), {"fsdp": 4, "tensor": 2}, 2, "muon"),
        (HEADS, {"data": 2, "fsdp": 2, "tensor": 2}, 1, "adamw"),
    ],
)
def test_eight_devices_equal_one(one_device, heads, sizes, accumulation, optimizer):
    want_metrics, want = one_device(heads, optimizer)
    got_metrics, got = two_steps(heads, sizes, 8, accumulation, optimizer)
    for one, other in zip(got_metrics, want_metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    worst = max(got, key=lambda path: np.abs(got[path] - want[path]).max())
    np.testing.assert_allclose(got[worst], want[worst], atol=3e-5, err_msg=worst)


def gradients(sizes, devices):
    """(loss, {path: gradient}) of a model of six query heads over three of keys and values."""
    config = micro()
    language = dataclasses.replace(config.language, heads=6, kv_heads=3)
    config = dataclasses.replace(config, language=language)
    mesh = make_mesh(sizes, jax.devices()[:devices])
    program = make_program(train_config(), config, mesh)
    split = flatten(program.abstract_state.params)["language/layers/self_attn/q_proj/kernel"]
    assert split.sharding.shard_shape(split.shape) == (2, 32, 6 * 8 // mesh.shape["tensor"])
    local = random_batch(bucket(4), config)
    compiled = program.lower_gradient(local).compile()
    params = small_params(program.abstract_state.params, size=0.2)
    batch, state = global_batch(local, mesh), program.init_state(params)
    found, sums = compiled(state, batch, program.base_key(0))
    return means(sums)["loss"], flatten(jax.tree.map(np.asarray, found))


@pytest.fixture(scope="module")
def undivided():
    return gradients({}, 1)


@pytest.mark.parametrize("tensor", [2, 4])
def test_heads_that_do_not_divide_the_mesh(undivided, tensor):
    """Three query heads a device, whose keys and values are whole everywhere; and one and a half,
    so that a head lies on two."""
    (loss, want), (found, got) = undivided, gradients({"data": 2, "tensor": tensor}, 2 * tensor)
    assert found == pytest.approx(loss, rel=1e-5)
    for path, gradient in want.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(got[path], gradient, atol=1e-4 * scale + 1e-7, err_msg=path)
    projections = [f"language/layers/self_attn/{name}_proj/kernel" for name in "qkvo"]
    assert all(np.abs(want[path]).max() > 1e-6 for path in projections)


def test_state_is_really_split():
    """An fsdp mesh of 8 leaves each device an eighth of a matrix and of its moments."""
    program = make_program(train_config(), micro(), make_mesh({"fsdp": 8}, jax.devices()[:8]))
    name = "params/language/layers/mlp/gate_proj/kernel"
    state = flatten(program.abstract_state)
    leaves = [x for path, x in state.items() if path.endswith(name.removeprefix("params"))]
    assert len(leaves) == 3 and name in state  # the parameter, mu and nu
    for leaf in leaves:
        assert leaf.sharding.shard_shape(leaf.shape) == (2, 32 // 8, 64)
