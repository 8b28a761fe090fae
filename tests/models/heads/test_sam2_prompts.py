"""Points and boxes of users as prompts of the SAM 2 head; a few small layers, no images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.heads import HeadInputs
from tpo_jax.models.heads.sam2.head import prompt_tokens
from tpo_jax.models.heads.sam2.image_encoder import ImageFeatures
from tpo_jax.models.heads.sam2.mask_decoder import MaskDecoder
from tpo_jax.models.heads.sam2.prompt_encoder import (
    BACKGROUND,
    CORNER_1,
    CORNER_2,
    FILLING,
    FOREGROUND,
    PromptEncoder,
)
from tpo_jax.models.layers import Rngs
from tpo_jax.models.sam2_config import SIZES

CONFIG = SIZES["micro"]
SIDE, WIDTH = CONFIG.image_size, CONFIG.width
BOX = [0.25, 0.125, 0.75, 0.5]


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(CONFIG, jax.random.key(1), rngs=Rngs(0))


def asked(labels, box_valid):
    """Two slots: points (0.5, 0.25) and (0.75, 0.5) with these labels, BOX where it is drawn."""
    points = np.broadcast_to(np.array([[0.5, 0.25], [0.75, 0.5]], np.float32), (1, 2, 2, 2))
    return HeadInputs(
        None, None, None, None, None, points=points, point_labels=np.array([labels], np.int32),
        point_frame=np.zeros((1, 2), np.int32), box_valid=np.array([box_valid]),
        boxes=np.broadcast_to(np.array(BOX, np.float32), (1, 2, 4)),
    )  # fmt: skip


ADAPTER = np.random.default_rng(0).normal(size=(1, 2, 3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def prompted(encoder):
    """Of inputs, by one program for all tests."""
    return jax.jit(lambda inputs: prompt_tokens(encoder, ADAPTER, inputs))


def kept(prompt, slot):
    return np.asarray(prompt.tokens[0, slot])[np.asarray(prompt.valid[0, slot])]


def given(encoder, places, labels):
    """Tokens of points in pixels, as `transformers` has them (tests/parity)."""
    call = jax.jit(lambda places, labels: encoder.points(places, labels))
    return np.asarray(call(jnp.array(places, jnp.float32), jnp.array(labels, jnp.int32)))


def test_points_take_the_place_of_the_slot_and_stand_between_box_and_filling(encoder, prompted):
    inputs = asked([[FOREGROUND, BACKGROUND], [FOREGROUND, FILLING]], [True, False])
    prompt = prompted(inputs)
    first, second = [0.5 * SIDE, 0.25 * SIDE], [0.75 * SIDE, 0.5 * SIDE]
    corners = [[0.25 * SIDE, 0.125 * SIDE], [0.75 * SIDE, 0.5 * SIDE]]

    def ordered(tokens):  # attention has no order
        return sorted(tokens.round(4).tolist())

    both = given(encoder, [*corners, first, second, [0, 0]],
                 [CORNER_1, CORNER_2, FOREGROUND, BACKGROUND, FILLING])  # fmt: skip
    assert ordered(kept(prompt, 0)) == ordered(both)
    assert ordered(kept(prompt, 1)) == ordered(given(encoder, [first, [0, 0]], [1, FILLING]))
    # One point alone leaves open what is meant.
    assert prompt.single.tolist() == [[True, False]]


def test_without_points_the_adapter_speaks_and_two_points_are_not_open(encoder, prompted):
    inputs = asked([[FILLING, FILLING], [FOREGROUND, FOREGROUND]], [False, False])
    prompt = prompted(inputs)
    np.testing.assert_array_equal(kept(prompt, 0), ADAPTER[0, 0])
    assert prompt.single.all() and len(kept(prompt, 1)) == 3
    plain = dataclasses.replace(inputs, points=None, point_labels=None)
    without = jax.eval_shape(lambda: prompt_tokens(encoder, ADAPTER, plain))
    assert without.valid is None and without.tokens.shape == ADAPTER.shape


@pytest.mark.long
def test_tokens_that_are_not_there_change_nothing():
    rng, grid = np.random.default_rng(1), CONFIG.grid
    structure, state = nnx.split(nnx.eval_shape(lambda: MaskDecoder(CONFIG, rngs=Rngs(0))))
    state = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype), state)

    def cells(scale, width):
        return rng.normal(size=(1, 1, scale * grid, scale * grid, width)).astype(np.float32)

    top, features = cells(1, WIDTH), ImageFeatures(cells(4, WIDTH // 8), cells(2, WIDTH // 4), None)
    position = cells(1, WIDTH)[0, 0]
    tokens = rng.normal(size=(1, 1, 5, WIDTH)).astype(np.float32)
    there = np.array([[[False, True, True, True, False]]])
    run = jax.jit(lambda state, *given: nnx.merge(structure, state)(*given))

    def call(prompt, valid):
        return run(state, top, features, prompt, position, valid)

    other = np.where(there[..., None], tokens, -3.0).astype(np.float32)
    found, again = call(tokens, there), call(other, there)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, again)
    seen = call(tokens, np.ones_like(there))
    assert np.abs(seen.masks - found.masks).max() > 1e-3
