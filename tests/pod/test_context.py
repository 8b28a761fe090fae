"""Rows split over the mesh axis `context`: the same numbers as on one device, in less memory."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import (
    SMOOTH,
    means,
    micro,
    pair_bucket,
    random_batch,
    train_config,
)

from tests.models.oracle import dense_attention, visible
from tpo_jax.models import xla_attention
from tpo_jax.models.attention import branch_attention, prefix_attention
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import LanguageModel, bind
from tpo_jax.models.layers import Rngs
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.objectives.logps import token_logps
from tpo_jax.parallel.context import ContextLayout
from tpo_jax.parallel.mesh import batch_sharding, global_batch, make_mesh, on_mesh, replicated
from tpo_jax.parallel.paths import flatten, unflatten
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.training.program import make_program

ONE, ALL_AXES = {}, {"data": 2, "context": 2, "tensor": 2}


def mesh_of(sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def packed_segments(rows, tokens):
    """Two packed prefixes and padding in the first row; one prefix that fills the others."""
    segments = np.ones((rows, tokens), np.int32)
    segments[0, tokens // 2 :] = 2
    segments[0, -tokens // 8 :] = 0
    return segments


def placed_attention(q, k, v, segments, window=None, backend="xla"):
    layout = ContextLayout.of(q.shape[1])
    spread = map(layout.spread, (q, k, v, segments))
    return layout.restore(prefix_attention(*spread, layout, window=window, backend=backend))


@pytest.mark.parametrize(
    ("backend", "window"), [("xla", None), ("xla", 7), ("splash_interpret", 7)]
)
def test_a_split_prefix_attends_as_the_rule_says(backend, window):
    q, k, v, segments = arrays = attention_arrays()
    run = functools.partial(placed_attention, window=window, backend=backend)
    got = on(run, ALL_AXES)(*arrays)
    for b in range(2):
        mask = visible(segments[b], segments[b], 0, window=window)
        want = dense_attention(q[b], k[b], v[b], mask)
        np.testing.assert_allclose(got[b], want, rtol=1e-5, atol=2e-6)


def attention_arrays(B=2, P=45, N=4, G=2, H=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, P, N, H), (B, P, G, H), (B, P, G, H))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return *arrays, packed_segments(B, P)


def on(function, sizes):
    mesh = mesh_of(sizes)
    return jax.jit(on_mesh(function, mesh), in_shardings=batch_sharding(mesh))


def test_the_kernel_has_the_gradient_of_xla_on_one_device():
    q, k, v, segments = attention_arrays()
    seen = (segments > 0)[..., None, None]

    def total(q, k, v, segments, backend):
        out = placed_attention(q, k, v, segments, backend=backend)
        return jnp.sum(jnp.where(seen, jnp.sin(out), 0.0))

    def gradient(sizes, backend):
        return on(jax.grad(functools.partial(total, backend=backend), (0, 1, 2)), sizes)

    want = gradient(ONE, "xla")(q, k, v, segments)
    got = gradient(ALL_AXES, "splash_interpret")(q, k, v, segments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


LANGUAGE = LanguageConfig(
    vocab_size=256, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64,
    remat="full"
)


def pair_batch(B=2, P=45, K=2, R=12):
    """A row of two packed prefixes with a branch about each, and a row with padded branches."""
    rng = np.random.default_rng(0)
    branch_segments = np.ones((B, K, R), np.int32)
    branch_segments[0, 1] = 2
    branch_segments[-1, 0, -3:] = 0
    return {
        "prefix": rng.normal(size=(B, P, LANGUAGE.width)).astype(np.float32),
        "prefix_segments": packed_segments(B, P),
        "branches": rng.integers(0, LANGUAGE.vocab_size, (B, K, R), np.int32),
        "branch_segments": branch_segments,
    }


def score(params, batch, config=LANGUAGE):
    """Log-probabilities of the branches, in chunks, and what comes out of the prefixes, summed."""
    model = bind(config, params)
    (B, P, _), (_, K, R) = batch["prefix"].shape, batch["branches"].shape
    segments, prefix_segments = batch["branch_segments"], batch["prefix_segments"]
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    own_positions = jnp.broadcast_to(P + jnp.arange(R), (B, K, R))
    hidden, branches = model(
        (batch["prefix"], positions, prefix_segments),
        (model.embed_tokens(batch["branches"]), own_positions, segments),
    )
    targets = batch["branches"][:, :, 1:]
    logps = token_logps(branches[:, :, :-1], model.table, targets, chunk=8)
    seen = prefix_segments[..., None] > 0
    weight = jnp.arange(P)[:, None] / P
    told = jnp.sum(jnp.where(seen, weight * jnp.sin(hidden), 0.0))
    return jnp.sum(jnp.where(segments[:, :, 1:] > 0, logps, 0.0)) + told


def gradient_program(sizes, batch, config=LANGUAGE):
    """Compiled (parameters, batch) -> (value, gradients by path), and its arguments."""
    mesh = mesh_of(sizes)
    model = LanguageModel(config, rngs=Rngs(0))
    params = unflatten({f"language/{k}": v for k, v in flatten(pure(model)).items()})["language"]
    shardings = param_shardings({"language": params}, mesh)["language"]
    places = (shardings, batch_sharding(mesh))
    run = jax.jit(
        on_mesh(jax.value_and_grad(functools.partial(score, config=config)), mesh),
        in_shardings=places, out_shardings=(replicated(mesh), shardings),
    )  # fmt: skip
    return run.lower(params, batch).compile(), jax.device_put((params, batch), places)


def pure(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


@pytest.fixture(scope="module")
def one_device():
    program, args = gradient_program(ONE, pair_batch())
    value, gradients = program(*args)
    return float(value), jax.tree.map(np.asarray, flatten(gradients))


@pytest.mark.parametrize(
    "sizes",
    [
        ALL_AXES,
        {"context": 4, "fsdp": 2},
        pytest.param({"context": 8}, marks=pytest.mark.long),
        pytest.param({"context": 2, "tensor": 4}, marks=pytest.mark.long),
        pytest.param({"data": 2, "context": 3}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_value_and_gradient_of_the_decoder_equal_one_device(one_device, sizes):
    program, args = gradient_program(sizes, pair_batch())
    value, gradients = program(*args)
    want_value, want = one_device
    assert float(value) == pytest.approx(want_value, rel=1e-5)
    for path, leaf in flatten(gradients).items():
        difference = np.abs(np.asarray(leaf) - want[path]).max()
        assert difference <= 1e-5 * np.abs(want[path]).max(), path


def test_windows_and_branches_in_turns_equal_one_device(monkeypatch):
    """24 branch tokens in three turns; a frame that is not there in the middle of a prefix, of
    which the window counts nothing."""
    config = dataclasses.replace(LANGUAGE, sliding_window=20, full_layers=1)
    batch = pair_batch()
    batch["prefix_segments"][1, 20:30] = 0
    program, args = gradient_program(ONE, batch, config)
    want_value, want = program(*args)
    monkeypatch.setattr(xla_attention, "LONG", 8)
    monkeypatch.setattr(xla_attention, "TURN", 8)
    program, args = gradient_program(ALL_AXES, batch, config)
    value, gradients = program(*args)
    assert float(value) == pytest.approx(float(want_value), rel=1e-5)
    want = flatten(want)
    for path, leaf in flatten(gradients).items():
        difference = np.abs(np.asarray(leaf) - np.asarray(want[path])).max()
        assert difference <= 1e-5 * np.abs(want[path]).max(), path


def test_each_device_holds_its_part_of_the_logits_of_a_turn():
    """Compiled, not run: 2,048 branch tokens with one head behind 16,384, whose logits are 128 MiB,
    16 MiB a turn, and a device's part of these 2 MiB."""
    P, K, R, C = 16384, 4, 512, 8
    mesh = mesh_of({"context": C})
    shapes = (1, K, R, 1, 8), *((1, P, 1, 8),) * 2, *((1, K, R, 1, 8),) * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segments = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, K, R), (1, P))]

    def total(arrays, own, prefix):
        out = branch_attention(*arrays, q_segments=own, prefix_segments=prefix, own_segments=own)
        return jnp.sum(jnp.sin(out))

    run = jax.jit(on_mesh(jax.grad(total), mesh), in_shardings=replicated(mesh))
    compiled = run.lower(arrays, *segments).compile()
    # Twelve such parts, 4 MiB of branches' own logits among them. Whole, a turn's are eight, and
    # so are a device's of all queries at once.
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 4 * 256 * P / C
    sizes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(np.prod([int(n) for n in size.split(",")]) for size in sizes) < 256 * P


def test_a_split_row_takes_a_fraction_of_the_memory_and_keys_alone_travel_whole():
    """Sixteen times the branches' length: what a device holds is its share of the prefix."""
    P, C = 2048, 8
    batch = pair_batch(B=1, P=P, R=16)
    config = dataclasses.replace(LANGUAGE, depth=3)
    one, split = (gradient_program(sizes, batch, config)[0] for sizes in (ONE, {"context": C}))
    bytes_of = [program.memory_analysis().temp_size_in_bytes for program in (one, split)]
    assert bytes_of[1] < bytes_of[0] / 4
    # "name = f32[1,2048,2,8]{...} all-gather(...)", or a tuple of such shapes
    gathered = re.findall(r" = (.*) all-gather(?:-start)?\(", split.as_text())
    shapes = re.findall(r"\w\[([\d,]+)\]", " ".join(gathered))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    keys = P * config.kv_heads * config.head_dim
    assert keys in sizes and max(sizes) <= P * config.width


def two_steps(sizes):
    """(metrics of two steps on pairs, parameters after them)."""
    config = micro()
    vision = dataclasses.replace(config.vision, motion=False, temporal="none")
    config = dataclasses.replace(config, vision=vision)
    params = jax.tree.map(np.asarray, FunctionalModel(config).init(jax.random.key(1)))
    mesh = mesh_of(sizes)
    options = train_config(objective="preference", optimizer=SMOOTH)
    options.preference.sft = 0.5
    program = make_program(options, config, mesh)
    local = random_batch(pair_bucket(4), config)
    compiled = program.compile_train_step(local)
    batch, state, key = global_batch(local, mesh), program.init_state(params), program.base_key(0)
    history = []
    for _ in range(2):
        state, metrics = compiled(state, batch, key)
        history.append(means(metrics))
    return history, flatten(jax.tree.map(np.asarray, state.params))


def test_a_train_step_on_pairs_equals_the_one_without_the_axis():
    want_metrics, want = two_steps(ONE)
    got_metrics, got = two_steps(ALL_AXES)
    for one, other in zip(got_metrics, want_metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    worst = max(got, key=lambda path: np.abs(got[path] - want[path]).max())
    np.testing.assert_allclose(got[worst], want[worst], atol=1e-5, err_msg=worst)
