"""Sharding by path: every leaf of the real models is placed, and what is wrong is named."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_batches import HEADS
from jax.sharding import PartitionSpec as P

from tpo_jax.models.presets import PRESETS
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import batch_sharding, make_mesh, on_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.rules import (
    LARGE_LEAF_BYTES,
    RULES,
    constrain_lookup,
    describe,
    first_match,
    follow_params,
    param_shardings,
    partition_spec,
    place,
)
from tpo_jax.training.optimizer import OptimizerConfig, make_optimizer


def mesh_of(**sizes):
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def seven_b():
    return FunctionalModel(PRESETS["7b"](HEADS)).abstract()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_leaf_of_every_preset_matches_a_rule(name):
    patterns = [pattern for pattern, _ in RULES]
    params = flatten(FunctionalModel(PRESETS[name](HEADS)).abstract())
    assert [path for path in params if first_match(patterns, path) is None] == []


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_large_leaves_of_a_7b_model_are_split(seven_b, sizes):
    """All of them over fsdp, and key/value projections of the decoder never over tensor."""
    shardings = flatten(param_shardings(seven_b, mesh_of(**sizes)))
    for path, x in flatten(seven_b).items():
        spec = shardings[path].spec
        if math.prod(x.shape) * 4 > 4 * LARGE_LEAF_BYTES:
            assert "fsdp" in spec, path
        if path.startswith("language/layers") and ("k_proj" in path or "v_proj" in path):
            assert "tensor" not in spec, path
        if "layers/" in path and not path.startswith("heads/"):
            assert not spec or spec[0] is None, path  # the scanned axis is whole
    if "tensor" in sizes:
        split = {p for p, s in shardings.items() if "tensor" in s.spec}
        assert {"language/embed/table", "language/lm_head/kernel"} < split
        assert "language/layers/mlp/down_proj/kernel" in split


def test_adapters_are_split_over_fsdp_wherever_they_hang():
    mesh = mesh_of(fsdp=2, tensor=2)
    for module in ("language/layers/self_attn/q_proj", "vision/layers/mlp/fc1"):
        assert partition_spec(f"{module}/lora_a", leaf(2, 32, 4), mesh) == P(None, "fsdp", None)
        assert partition_spec(f"{module}/lora_b", leaf(2, 4, 32), mesh) == P(None, None, "fsdp")
    for module in ("connector/mlp/fc1", "language/lm_head"):
        assert partition_spec(f"{module}/lora_a", leaf(32, 4), mesh) == P("fsdp", None)
        assert partition_spec(f"{module}/lora_b", leaf(4, 32), mesh) == P(None, "fsdp")


def test_first_match_wins():
    rules = [("a/b", P("fsdp")), ("a/", P())]
    assert partition_spec("a/b", leaf(4), mesh_of(fsdp=2), rules) == P("fsdp")
    assert partition_spec("a/c", leaf(4), mesh_of(fsdp=2), rules) == P()


def test_small_leaves_that_do_not_fit_stay_whole():
    mesh, rules = mesh_of(fsdp=2), [("a", P("fsdp", None))]
    assert partition_spec("a", leaf(3, 4), mesh, rules) == P(None, None)
    assert partition_spec("unknown", leaf(3, 4), mesh, rules) == P()


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("a", (513, 1024), r"params/a: dimension 0 of \(513, 1024\).*fsdp=2.*config.mesh.fsdp"),
        ("b", (512, 1024), r"params/b: shape \(512, 1024\) \(2.0 MiB\) matches no sharding rule"),
        ("a", (4,), r"params/a: rule 'a' gives.*\(4,\)"),
    ],
)
def test_a_large_leaf_that_cannot_be_placed_is_an_error_by_name(path, shape, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(path, leaf(*shape), mesh_of(fsdp=2), [("a", P("fsdp", None))])


def test_one_device_takes_anything():
    assert partition_spec("unknown", leaf(1024, 1024), mesh_of(data=1), []) == P()


def test_optimizer_state_follows_its_parameter():
    params = {"language": {"lm_head": {"kernel": leaf(8, 16)}}, "b": {"scale": leaf(8)}}
    mesh = mesh_of(fsdp=2, tensor=2)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    specs = {
        path: sharding.spec
        for path, sharding in flatten(
            follow_params(state, params, param_shardings(params, mesh), mesh)
        ).items()
    }
    for moment in ("mu", "nu"):
        assert specs[f"0/{moment}/language/lm_head/kernel"] == P("fsdp", "tensor")
        assert specs[f"0/{moment}/b/scale"] == P()
    assert specs["0/count"] == P()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_muon_is_split_like_its_parameters_and_gives_the_same_update(sizes):
    rng = np.random.default_rng(0)
    shape = (2, 32, 64)  # two layers
    params = {"language": {"layers": {"mlp": {"up_proj": {"kernel": np.zeros(shape, np.float32)}}}}}
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    config = OptimizerConfig("muon", warmup=0.0, weight_decay=0.0, clip=1.0, min_lr_ratio=1.0)
    transform = make_optimizer(config, [(".*", 1e-2)], 10, params).transform
    want, _ = jax.jit(transform.update)(grads, transform.init(params), params)

    mesh = mesh_of(**sizes)
    shardings = param_shardings(params, mesh)
    state = transform.init(params)
    states = follow_params(state, params, shardings, mesh)
    momentum = [s for path, s in flatten(states).items() if path.endswith("up_proj/kernel")]
    assert momentum and all(s.spec == only_leaf(shardings).spec for s in momentum)
    assert any(axis is not None for axis in only_leaf(shardings).spec)
    placed = place(grads, shardings), place(state, states), place(params, shardings)
    got, _ = jax.jit(transform.update)(*placed)
    np.testing.assert_allclose(only_leaf(got), only_leaf(want), atol=1e-6)


def only_leaf(tree):
    (only,) = flatten(tree).values()
    return only


def test_a_large_state_leaf_without_a_parameter_is_an_error_by_name():
    mesh = mesh_of(fsdp=2)
    with pytest.raises(ValueError, match="opt_state/lost"):
        follow_params({"lost": leaf(1024, 1024)}, {}, {}, mesh)


def test_place_puts_shards_where_the_rules_say():
    params = {"connector": {"mlp": {"fc1": {"kernel": np.arange(32.0).reshape(4, 8)}}}}
    mesh = mesh_of(fsdp=2, tensor=2)
    placed = place(params, param_shardings(params, mesh))["connector"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(placed, params["connector"]["mlp"]["fc1"]["kernel"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


def test_describe_lists_every_leaf():
    params = {"a": {"kernel": leaf(4, 4)}, "b": {"scale": leaf(4)}}
    lines = describe(params, param_shardings(params, mesh_of(fsdp=2))).splitlines()
    assert len(lines) == 2 and "a/kernel" in lines[0] and "fsdp" in lines[0]


@pytest.mark.parametrize("columns", [8, 7])  # 7 do not divide over fsdp
def test_a_lookup_on_a_mesh_gives_the_vectors_and_the_gradient_of_the_table(columns):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    spec = P("tensor", "fsdp" if columns == 8 else None)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(16, columns)).astype(np.float32)
    tokens = rng.integers(0, 16, (8, 5))
    factors = rng.normal(size=(8, 5, columns)).astype(np.float32)

    def weighted(table, tokens, factors):
        vectors = constrain_lookup(jnp.take(table, tokens, axis=0))
        return jnp.sum(vectors * factors), vectors

    rows = batch_sharding(mesh)
    step = jax.jit(
        on_mesh(jax.grad(weighted, has_aux=True), mesh),
        in_shardings=(jax.NamedSharding(mesh, spec), rows, rows),
    )
    gradient, vectors = step(table, tokens, factors)
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, factors)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(vectors, table[tokens])
