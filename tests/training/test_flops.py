"""Counted FLOPs against closed formulas."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest
from fake_batches import HEADS, bucket, micro, train_config

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.connector import TIME_WAVES
from tpo_jax.models.heads import sam2
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.layers import Rngs
from tpo_jax.models.presets import PRESETS
from tpo_jax.models.sam2_config import SIZES
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.flops import (
    _gradient,
    forward_flops,
    matmul_flops,
    peak_flops,
    train_flops,
)
from tpo_jax.training.program import make_program
from tpo_jax.training.step import make_gradient_step


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_counts_scans_by_length_and_looks_into_nested_programs():
    def layer(x, w):
        return jax.checkpoint(jax.jit(jnp.tanh))(x @ w), None

    def stack(x, w):
        return jax.lax.scan(layer, x, w)[0]

    assert matmul_flops(stack, spec(4, 8), spec(3, 8, 8)) == 3 * 2 * 4 * 8 * 8


def test_counts_batched_products_and_the_backward_pass():
    def loss(x, y):
        return jnp.einsum("bij,bjk->bik", x, y).sum()

    shapes = spec(5, 2, 3), spec(5, 3, 4)
    assert matmul_flops(loss, *shapes) == 2 * 5 * 2 * 3 * 4
    # The product itself is not needed for its gradient: two products, one for each argument.
    assert matmul_flops(jax.grad(loss, (0, 1)), *shapes) >= 2 * 2 * 5 * 2 * 3 * 4


def test_one_branch_of_a_condition_counts():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x)

    assert matmul_flops(either, jax.ShapeDtypeStruct((), jnp.bool_), spec(4, 4)) == 2 * 4**3


@pytest.fixture(scope="module")
def counted():
    config, shapes = micro(HEADS), bucket(8)
    batch = batch_spec(shapes, config)
    return config, shapes, batch, forward_flops(config, batch)


def test_language_equals_its_formula(counted):
    config, b, batch, flops = counted
    c = config.language
    P, T = batch["prefix_tokens"].shape[1], b.branches * b.branch_tokens
    weights = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp_width
    attention = 2 * c.heads * c.head_dim * (P * P + T * (P + b.branch_tokens))
    layers = c.depth * b.batch_size * (2 * weights * (P + T) + 2 * attention)
    # Boxes of users go through the box encoder: 4 -> D -> D.
    boxes = 2 * b.batch_size * b.capacity("box") * (4 * c.width + c.width**2)
    assert flops["language"] == layers + boxes


def test_vision_equals_its_formula(counted):
    config, b, _, flops = counted
    c, frames = config.vision, b.batch_size * b.frames
    sides = [c.image_size // c.stem_strides[0], c.grid]
    channels = (c.channels, *c.stem_widths)
    stem = sum(
        frames * sides[i] ** 2 * c.stem_strides[i] ** 2 * channels[i] * channels[i + 1]
        for i in range(2)
    )
    patches = c.grid**2
    projections = 2 * 4 * c.width**2 + 2 * c.width * c.mlp_width  # over space and over time
    mixing = 2 * c.width * (patches + b.frames)
    layers = c.depth * frames * patches * (projections + mixing)
    tokens = frames * config.connector.tokens_per_frame
    connector = tokens * config.connector.hidden * (c.width + config.language.width)
    connector += frames * 2 * TIME_WAVES * config.language.width
    assert flops["vision"] == 2 * (stem + layers + connector)


def test_lm_head_runs_on_answers_only(counted):
    config, b, _, flops = counted
    tokens = b.batch_size * b.branches * b.answers
    assert flops["lm_head"] == 2 * tokens * config.language.width * config.language.vocab_size


def test_heads_count(counted):
    assert counted[3]["heads"] > 0


@pytest.mark.parametrize(("trained", "vision", "language", "lm_head"), [
    (".*", 3, 3, 3),
    ("connector/", 1, 2, 2),  # and the connector's weights, which are part of "vision"
    ("vision/", 2, 2, 2),  # likewise the tower's
    ("language/", 1, 3, 3),
    ("task_tokens/", 1, 2, 2),
    ("heads/", 1, 1, 1),
    ("language/lm_head", 1, 1, 2),
    ("language/.*lora_[ab]", 1, 2, 2),  # and the weights of adapters
])  # fmt: skip
def test_a_train_step_leaves_out_what_frozen_weights_do_not_need(
    monkeypatch, counted, trained, vision, language, lm_head
):
    """Of models without heads, whose products are counted one by one."""
    config, _, batch, flops = counted
    config = dataclasses.replace(config, lora=LoraConfig("language/.*kernel", 2, 4.0))
    heads = types.SimpleNamespace(predictions={})
    monkeypatch.setattr("tpo_jax.training.flops._forward", lambda *_: (dict(flops), heads))
    sizes = {path: leaf.size for path, leaf in flatten(FunctionalModel(config).abstract()).items()}
    paths = [path for path in sizes if re.match(trained, path)]

    def share(*tops):
        """Of the weights of these paths, how many are trained."""
        here = [path for path in sizes if path.startswith(tops)]
        return sum(sizes[p] for p in here if p in paths) / sum(sizes[p] for p in here)

    more = 0.0
    if trained in ("connector/", "vision/"):
        more = share("vision/", "connector/") * flops["vision"]
    if "lora" in trained:
        layers, head = ("language/layers/", "language/final_norm/"), ("language/lm_head/",)
        more = share(*layers) * flops["language"] + share(*head) * flops["lm_head"]
    times = {"vision": vision, "language": language, "lm_head": lm_head, "heads": 1}
    want = sum(times[part] * flops[part] for part in flops) + more
    assert train_flops(config, batch, paths, {}) == pytest.approx(want, rel=1e-6)


def test_the_gradient_of_a_product_costs_once_for_each_operand_that_it_reaches():
    def layers(x, w, frozen, flag):
        x, seen = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), x @ frozen), x, w)
        x = jax.lax.cond(flag, lambda x: x @ frozen, lambda x: x, x)
        return x, seen, jax.lax.stop_gradient(x) @ frozen, jnp.argmax(x @ x, 0)

    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    jaxpr = jax.make_jaxpr(layers)(spec(4, 4), spec(3, 4, 4), spec(4, 4), flag).jaxpr
    product = 2 * 4**3

    def counted(*moved, results=None):
        return _gradient(jaxpr, [name in moved for name in ("x", "w", "frozen", "flag")], results)

    # Of x alone: three turns of two products, and one behind them. A weight's own gradient costs as
    # much again, and what one turn carries depends on it in the next.
    assert counted("x")[0] == (3 * 2 + 1) * product
    assert counted("w") == ((3 * 3 + 1) * product, [True, True, False, False])
    assert counted("w", results=jaxpr.outvars[1:2])[0] == 3 * 3 * product
    assert counted()[0] == 0


def needed_and_computed(config, batch, trained, **changes):
    """FLOPs of a step by `train_flops`, and products of its traced gradient."""
    language = dataclasses.replace(config.language, attention="dense")
    dense, mesh = dataclasses.replace(config, language=language), make_mesh({}, jax.devices()[:1])
    program = make_program(train_config(trainable=trained, **changes), dense, mesh)
    step = make_gradient_step(program.model, program.objective, program.optimizer)
    key = jax.eval_shape(jax.random.key, jnp.uint32(0))
    computed = matmul_flops(step, program.abstract_state, batch, key)
    rates, weights = program.optimizer.learning_rates, program.objective.weights
    return train_flops(config, batch, rates, weights), computed


def test_a_step_computes_what_it_is_said_to_need():
    """The products of the traced gradient of a model without heads. It computes the logits of
    answers twice, and no gradient of pixels; beside frozen weights the gradient of attention costs
    twice, not once."""
    config = dataclasses.replace(micro(), lora=LoraConfig("language/.*kernel", 2, 4.0))
    batch = batch_spec(bucket(8), config)
    for trained in (".*", "language/", "connector/", "language/.*lora_[ab]"):
        needed, computed = needed_and_computed(config, batch, [[trained, 1e-3]])
        assert 0.8 < needed / computed < 1.01, trained


@pytest.mark.parametrize("trained", [".*", "heads/temporal", "task_tokens/"])
def test_a_step_with_heads_computes_what_it_is_said_to_need(trained):
    config, batch = micro(HEADS), batch_spec(bucket(8), micro(HEADS))
    needed, computed = needed_and_computed(config, batch, [[trained, 1e-3]], heads=HEADS)
    assert 0.8 < needed / computed < 1.01


def test_a_frozen_network_in_a_head_has_no_gradient_but_behind_its_prompt():
    """The image encoder of SAM 2 reads frames alone. Losses of weight 0 are only reported."""
    tokens = PRESETS["micro"](("mask",)).tokens  # of the same task
    config = dataclasses.replace(micro(), heads=("sam2",), tokens=tokens, sam2=SIZES["micro"])
    batch = batch_spec(bucket(2), config)
    forward = forward_flops(config, batch)
    paths, weights = flatten(FunctionalModel(config).abstract()), sam2.published_weights()
    once, heads = sum(forward.values()), forward["heads"]

    def step(trained, weights):
        return train_flops(config, batch, [p for p in paths if re.match(trained, p)], weights)

    size = SIZES["micro"].image_size
    encoder = matmul_flops(lambda x: Sam2(SIZES["micro"], rngs=Rngs(0)).features(x),
                           spec(2, 4, size, size, 3))  # fmt: skip
    assert 0 < encoder < heads
    assert step("heads/sam2/adapter", dict.fromkeys(weights, 0.0)) == once
    assert 0.5 < (step("heads/sam2/adapter", weights) - once) / (heads - encoder) < 2
    assert 2.9 < (step(".*", weights) - 3 * (once - heads)) / heads <= 3


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v5 lite", 197e12),
        ("NVIDIA H200 MIG 1g.18gb", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_of_all_devices_is_that_of_each_kind(kind, peak):
    device = types.SimpleNamespace(device_kind=kind)
    assert peak_flops([device] * 2) == (None if peak is None else 2 * peak)
    if peak is not None:
        assert peak_flops([device, types.SimpleNamespace(device_kind="TPU v1")]) is None


def test_the_view_that_heads_alone_read_counts_where_they_run():
    """UniRes shows the tiles of an image and not the whole of it, which heads answer about."""

    def vision(tiles, heads=(), idle=()):
        config = PRESETS["longva_tiny"](heads)
        image = bucket(2, media="image", frames=1, tiles=tiles, slots={}, idle=idle)
        return config, forward_flops(config, batch_spec(image, config))["vision"]

    head = ("temporal",)
    (config, one), (_, four) = vision(1), vision(4)
    (_, seen), (_, idle) = vision(4, head), vision(4, head, head)
    patches, widths = 2 * config.vision.grid**2, (config.vision.width, config.language.width)
    connector = 2 * patches * widths[1] * sum(widths)
    assert idle == four == 4 * one > 0
    assert seen == four + one - connector
