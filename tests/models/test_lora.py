import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.batches import model_batch
from tpo_jax.models import lora
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.layers import Linear, Rngs
from tpo_jax.models.presets import micro
from tpo_jax.models.video_language import FunctionalModel

LORA = LoraConfig(r"^language/(layers/.*(q|v|down)_proj|lm_head)/kernel$", rank=3, alpha=6.0)
BASE = micro()
ADAPTED = dataclasses.replace(BASE, lora=LORA)


def _paths(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def _set(tree, value):
    """The adapted tree with every lora_b drawn instead of zero."""
    keys = iter(jax.random.split(jax.random.key(7), 100))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: value * jax.random.normal(next(keys), x.shape)
        if path[-1].key == "lora_b" else x, tree,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch, keys=None):
    bound = model.bind(params)
    return bound(batch, keys).branch_hidden @ bound.language.table.T


@pytest.fixture(scope="module")
def adapted():
    model = FunctionalModel(ADAPTED)
    return model, jax.jit(model.init)(jax.random.key(0))


def test_adapters_are_separate_leaves_of_the_chosen_kernels(adapted):
    _, params = adapted
    extra = {p: x for p, x in _paths(params).items() if "lora" in p}
    names = {path.rsplit("/", 1)[0].removeprefix("language/") for path in extra}
    assert names == {
        "layers/self_attn/q_proj", "layers/self_attn/v_proj", "layers/mlp/down_proj", "lm_head",
    }  # fmt: skip
    assert extra["language/layers/mlp/down_proj/lora_a"].shape == (2, 64, 3)
    assert extra["language/layers/mlp/down_proj/lora_b"].shape == (2, 3, 32)
    base = _paths(FunctionalModel(BASE).abstract())
    assert set(base) == set(_paths(params)) - set(extra)


def test_a_new_adapter_changes_nothing_and_merge_equals_adapter_on(adapted):
    model, params = adapted
    base = FunctionalModel(BASE)
    batch = model_batch(BASE, B=1, F=2, K=2, R=6)
    without = lora.merge(params, LORA)
    np.testing.assert_array_equal(
        _logits(model, params, batch), _logits(base, without, batch)
    )
    trained = _set(params, 0.1)
    on = _logits(model, trained, batch)
    assert np.abs(on - _logits(model, params, batch)).max() > 1e-2
    np.testing.assert_allclose(_logits(base, lora.merge(trained, LORA), batch), on, atol=1e-4)


def test_gradient_reaches_every_adapter(adapted):
    model, params = adapted
    batch = model_batch(BASE, B=1, F=2, K=2, R=6)
    total = jax.grad(lambda params: jnp.sum(jnp.sin(_logits(model, params, batch))))
    gradient = jax.jit(total)(_set(params, 0.1))
    for path, leaf in _paths(gradient).items():
        if "lora" in path:
            assert np.abs(leaf).max() > 0, path


def test_dropout_hides_inputs_from_adapters_alone_row_by_row(adapted):
    _, params = adapted
    dropping = dataclasses.replace(BASE, lora=dataclasses.replace(LORA, dropout=0.4))
    model = FunctionalModel(dropping)
    batch = model_batch(BASE, B=2, F=2, K=2, R=6)
    keys = jax.random.split(jax.random.key(3), 2)
    # An adapter that adds nothing has nothing to lose.
    plain = _logits(model, params, batch)
    np.testing.assert_array_equal(_logits(model, params, batch, keys), plain)
    trained = _set(params, 0.1)
    dropped = _logits(model, trained, batch, keys)
    assert np.abs(dropped - _logits(model, trained, batch)).max() > 1e-2
    np.testing.assert_array_equal(_logits(adapted[0], trained, batch, keys),
                                  _logits(model, trained, batch))  # fmt: skip
    other = _logits(model, trained, batch, keys.at[1].set(jax.random.key(4)))
    np.testing.assert_array_equal(other[0], dropped[0])
    assert np.abs(other[1] - dropped[1]).max() > 1e-2


def test_dropout_of_an_adapter_reads_what_is_left_as_peft_does():
    """y = x W + scale drop(x) A B; each of the 32 masks in its share of the rows."""
    rows, draw = 4000, np.random.default_rng(0).normal
    layer = Linear(5, 3, rngs=Rngs(0), bias=False)
    a, b = (jnp.asarray(draw(size=shape), jnp.float32) for shape in [(5, 2), (2, 3)])
    layer.lora_a, layer.lora_b = nnx.data(nnx.Param(a)), nnx.data(nnx.Param(b))
    layer.lora_scale, layer.lora_dropout = 2.0, 0.25
    x = jnp.broadcast_to(jnp.asarray(draw(size=5), jnp.float32), (rows, 1, 5))
    found = np.asarray(layer(x, jax.random.split(jax.random.key(1), rows)))[:, 0]
    # One entry of x hidden or not, each in a share of 0.25: 32 outputs.
    added = np.asarray(2.0 * a @ b)
    masks = np.array(list(itertools.product([0, 1], repeat=5)))
    wanted = x[0] @ layer.kernel[...] + (masks / 0.75 * np.asarray(x[0])) @ added
    distance = np.abs(found[:, None] - np.asarray(wanted)).max(-1)
    assert distance.min(-1).max() < 1e-4
    often = np.bincount(distance.argmin(-1), minlength=32) / rows
    share = 0.75 ** masks.sum(-1) * 0.25 ** (5 - masks.sum(-1))
    np.testing.assert_allclose(often, share, atol=0.02)


def test_a_pattern_that_matches_nothing_is_an_error():
    config = dataclasses.replace(BASE, lora=LoraConfig("query_proj", 2, 2.0))
    with pytest.raises(ValueError, match="lora.pattern='query_proj' matches no kernel"):
        FunctionalModel(config)
