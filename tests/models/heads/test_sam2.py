"""SAM 2 as a head of the micro model: gradients, training, prompts, memory."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_batches import micro
from flax import nnx

from tpo_jax.data.moving_shapes import WorldConfig, render, simulate
from tpo_jax.models.heads import HeadInputs, sam2
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.heads.sam2.tracking import Prompt, track
from tpo_jax.models.layers import Rngs
from tpo_jax.models.sam2_config import SIZES
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.memory import peak_bytes

CONFIG = dataclasses.replace(micro(), heads=("sam2",), sam2=SIZES["micro"])
B, S, F, SIDE = 2, 2, 4, 32
WEIGHTS = sam2.published_weights()
# No gradient: frequencies are drawn for good; what is added to all keys of a softmax; what only a
# prompted mask reads; what only objects that are called absent have (none here, at first); what
# only points and boxes of the user have (the adapter's tokens stand in their place).
BLIND = (
    r"/frequencies$|/k_proj/bias$|/mask_embedding/|/mask_downsample/|/occlusion$|/no_pointer$"
    r"|prompt_encoder/labels$"
)


def _head():
    return sam2.Sam2Head(CONFIG, rngs=Rngs(0))


STRUCTURE = nnx.graphdef(nnx.eval_shape(_head))


def _bound(params):
    return nnx.merge(STRUCTURE, nnx.State(jax.tree.map(nnx.Param, params)))


@functools.cache
def _start():
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(_head())))()
    params = jax.tree.map(np.array, params)  # copies, to be written
    # So that all objects are called present at first.
    params["network"]["mask_decoder"]["presence_mlp"]["proj_out"]["bias"] += 2.0
    params["network"]["memory_encoder"]["fuser"]["scale"] += 0.1
    return params


def _clip(seed):
    """(uint8[F, 32, 32, 3], bool[N, F, 32, 32]): every sixth frame of a scene of moving shapes."""
    rendered = render(simulate((seed,), WorldConfig()))
    return rendered.frames[: 6 * F : 6, ::2, ::2], rendered.visible[:, : 6 * F : 6, ::2, ::2]


@functools.cache
def _inputs():
    """Two clips of moving shapes, two objects each; the last frame of the second is a filling."""
    clips = [_clip(seed) for seed in range(B)]
    frames = np.stack([frames for frames, _ in clips])
    m = CONFIG.mask_size
    step = SIDE // m
    masks = np.stack([visible[:S, :, ::step, ::step] for _, visible in clips]).astype(np.uint8)
    frame_valid = np.ones((B, F), bool)
    frame_valid[1, -1] = False
    targets = {
        "masks": masks, "labelled": np.broadcast_to(frame_valid[:, None], (B, S, F)),
        "valid": np.ones((B, S), bool),
    }  # fmt: skip
    states = np.random.default_rng(0).normal(size=(B, S, CONFIG.language.width))
    return HeadInputs(
        states.astype(np.float32), None, frames.astype(np.float32) / 127.5 - 1, frame_valid, None,
        targets=targets,
    )  # fmt: skip


def _total(params, slot_states, inputs):
    inputs = dataclasses.replace(inputs, slot_states=slot_states)
    predictions = _bound(params)(inputs)
    terms = sam2.loss(predictions, inputs.targets, inputs.targets["valid"])
    return sum(WEIGHTS[name] * term.mean() for name, term in terms.items()), terms


@functools.cache
def _gradient():
    return jax.jit(
        jax.value_and_grad(_total, argnums=(0, 1), has_aux=True)
    )


@functools.cache
def _predict():
    return jax.jit(lambda params, inputs: _bound(params)(inputs))


@pytest.mark.long
def test_every_parameter_and_the_slot_state_have_a_gradient():
    inputs = _inputs()
    (_, terms), (gradients, states) = _gradient()(_start(), inputs.slot_states, inputs)
    assert all(term.weight > 0 for term in terms.values())
    assert np.all(np.isfinite(states)) and np.all(np.abs(states).max(axis=-1) > 1e-6)
    leaves = flatten(gradients)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values())
    blind = {path for path, leaf in leaves.items() if not np.abs(leaf).max()}
    assert not {path for path in blind if not re.search(BLIND, path)}


def test_with_remat_frames_are_encoded_one_at_a_time():
    """The same features in a fraction of the memory."""
    pixels = _inputs().frames
    frame = np.array([[1, 2], [0, 3]])
    found, memory = {}, {}
    for remat in ("", "full"):
        config = dataclasses.replace(CONFIG, sam2=dataclasses.replace(CONFIG.sam2, remat=remat))

        def features(params, pixels, config=config):
            structure = nnx.graphdef(
                nnx.eval_shape(lambda: sam2.Sam2Head(config, rngs=Rngs(0)))
            )
            head = nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, params)))
            return head._reader(pixels, keep=True)(jnp.asarray(frame))

        found[remat] = jax.jit(features)(_start(), pixels)
        memory[remat] = peak_bytes(jax.make_jaxpr(features)(_start(), pixels))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found.values())
    assert memory["full"] < 0.6 * memory[""]


def test_prompts_and_cells_have_the_same_places_from_the_start():
    network = _start()["network"]
    frequencies = network["image_positions"]["frequencies"]
    assert np.ptp(frequencies) > 0
    np.testing.assert_array_equal(
        frequencies, network["prompt_encoder"]["positions"]["frequencies"]
    )


@functools.cache
def _start_of_equal_overlaps():
    """Parameters whose predicted IoU is the same everywhere: the surest is what is most present."""
    params = jax.tree.map(np.array, _start())
    params["network"]["mask_decoder"]["iou_mlp"]["proj_out"]["kernel"][:] = 0.0
    return params


@functools.cache
def _surest_frames():
    """(int[B, S] surest frame of all F, `begin` itself): what it calls present of each frame alone,
    no other being there."""

    @jax.jit
    def begin(params, inputs):
        frame, found, _ = _bound(params).begin(inputs)
        return frame, found["presence"][..., 0]

    inputs = dataclasses.replace(_inputs(), targets=None)
    alone = []
    for frame in range(F):
        there = np.tile(np.arange(F) == frame, (B, 1))
        only = dataclasses.replace(inputs, frame_valid=there)
        chosen, presence = begin(_start_of_equal_overlaps(), only)
        assert np.all(chosen == frame)
        alone.append(presence)
    return np.argmax(alone, axis=0), begin


def test_an_object_is_prompted_where_it_is_surest_wherever_that_frame_comes():
    surest, begin = _surest_frames()
    everything = dataclasses.replace(
        _inputs(), targets=None, frame_valid=np.ones((B, F), bool)
    )
    found, _ = begin(_start_of_equal_overlaps(), everything)
    np.testing.assert_array_equal(found, surest)
    turned = dataclasses.replace(everything, frames=everything.frames[:, ::-1])
    found, _ = begin(_start_of_equal_overlaps(), turned)
    np.testing.assert_array_equal(found, F - 1 - surest)


def test_in_training_it_is_prompted_where_most_of_it_is_labelled_else_where_it_is_surest():
    """Slots: an object that appears late, one without a label, one that grows, one that goes."""
    surest, _ = _surest_frames()
    masks = np.zeros((B, S, F, CONFIG.mask_size, CONFIG.mask_size), np.uint8)
    masks[0, 0, 2, 1:3, 2:6] = 1
    masks[1, 0, 1, :2, :2] = masks[1, 0, 3, :4, :4] = 1
    masks[1, 1, 0, :4, :4] = masks[1, 1, 1, :2, :2] = 1
    targets = {"masks": masks, "labelled": np.ones((B, S, F), bool), "valid": np.ones((B, S), bool)}
    targets["labelled"][0, 1] = False
    inputs = dataclasses.replace(_inputs(), targets=targets, frame_valid=np.ones((B, F), bool))

    @jax.jit
    def forward(params, inputs):
        found = _bound(params)(inputs)
        return found["asked"], found["labelled_box"]  # nothing is tracked for these

    asked, box = forward(_start_of_equal_overlaps(), inputs)
    # The closed prompt's mask is asked for in the prompted frame, the three others behind it.
    start = np.array([[2, surest[0, 1]], [3, 0]])
    np.testing.assert_array_equal(asked[..., 0], np.arange(F) == start[..., None])
    m = CONFIG.mask_size
    wanted = np.array([[[2, 1, 6, 3], [0] * 4], [[0, 0, 4, 4], [0, 0, 4, 4]]]) / m
    np.testing.assert_allclose(box, wanted, atol=1e-6)


@pytest.mark.long
def test_trains_on_moving_shapes():
    """Adam on two clips: every mask term falls, and so does the whole."""
    inputs = _inputs()
    optimizer = optax.adam(1e-2)
    params, state, history = _start(), optimizer.init(_start()), []
    for _ in range(60):
        (total, terms), (gradients, _) = _gradient()(params, inputs.slot_states, inputs)
        history.append({"total": float(total)} | {n: float(t.mean()) for n, t in terms.items()})
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(params, updates)
    for name in ("total", "sam2/dice", "sam2/still_dice", "sam2/focal", "sam2/still_focal"):
        assert history[-1][name] < 0.8 * history[0][name], (name, history[0], history[-1])


@pytest.mark.long
def test_a_drawn_box_takes_the_place_of_the_slot_and_fillings_are_not_read():
    whole = dataclasses.replace(
        _inputs(), targets=None, boxes=np.full((B, S, 4), [0.2, 0.1, 0.7, 0.6], np.float32),
        box_valid=np.array([[True, False], [True, True]]), box_frame=np.zeros((B, S), np.int32),
    )  # fmt: skip
    found = _predict()(_start(), whole)
    assert found["masks"].shape == (B, S, F, CONFIG.mask_size, CONFIG.mask_size)
    other = dataclasses.replace(whole, slot_states=-whole.slot_states)
    changed = _predict()(_start(), other)
    same = np.array([[np.allclose(found["masks"][b, s], changed["masks"][b, s], atol=1e-5)
                      for s in range(S)] for b in range(B)])  # fmt: skip
    assert same.tolist() == [[True, False], [True, True]]
    frames = np.array(whole.frames)
    frames[~whole.frame_valid] = 0.7
    padded = _predict()(_start(), dataclasses.replace(whole, frames=frames))
    shown = np.broadcast_to(whole.frame_valid[:, None], (B, S, F))
    for name in ("masks", "presence"):
        np.testing.assert_allclose(padded[name][shown], found[name][shown], atol=1e-4)


@pytest.mark.long
def test_a_box_prompts_the_frame_that_it_is_drawn_on():
    """That frame is read without a memory, so what came before, without the object, is nothing to
    it; drawn on the first frame, the box leaves its mark on all that follow."""
    inputs = dataclasses.replace(
        _inputs(), targets=None, boxes=np.full((B, S, 4), [0.2, 0.1, 0.7, 0.6], np.float32),
        box_valid=np.ones((B, S), bool), box_frame=np.array([[2, 0], [2, 0]], np.int32),
    )  # fmt: skip
    found = _predict()(_start(), inputs)["masks"]
    frames = np.array(inputs.frames)
    frames[:, 0] = -0.5
    changed = _predict()(_start(), dataclasses.replace(inputs, frames=frames))["masks"]
    np.testing.assert_allclose(changed[:, 0, 2], found[:, 0, 2], atol=1e-5)
    assert np.abs(changed[:, 0, 0] - found[:, 0, 0]).max() > 1e-3
    assert np.abs(changed[:, 1, 2] - found[:, 1, 2]).max() > 1e-3


@pytest.mark.long
def test_a_video_in_windows_is_tracked_as_the_whole_clip_is():
    """Two objects prompted on frames 2 and 0, followed two frames at a time: all that `track` says,
    frame by frame."""
    frames, slots = np.array(_inputs().frames[:1]), np.array([[2, 0]], np.int32)
    whole = dataclasses.replace(
        _inputs(), targets=None, frames=frames, slot_states=_inputs().slot_states[:1],
        frame_valid=np.ones((1, F), bool), box_frame=slots, box_valid=np.ones((1, S), bool),
        boxes=np.array([[[0.2, 0.1, 0.7, 0.6], [0.5, 0.4, 0.9, 0.8]]], np.float32),
    )  # fmt: skip
    expected = _predict()(_start(), whole)

    begin = jax.jit(lambda params, inputs: _bound(params).begin(inputs))
    go_on = jax.jit(lambda params, *given: _bound(params).go_on(*given))
    start, prompted, followed = begin(_start(), whole)
    assert start.tolist() == [[2, 0]]
    found = {name: np.full(x.shape, np.nan) for name, x in expected.items()}
    for name, x in prompted.items():
        found[name][0, [0, 1], [2, 0]] = x[0, :, 0]
    # The last frame of the second window is a filling: what it says is not kept.
    for direction, windows in ((1, [([1, 2], 2), ([3, 3], 1)]), (-1, [([1, 0], 2)])):
        if direction < 0:
            followed = _head().turned(followed)
        for window, count in windows:
            index, there = np.array(window, np.int32), np.arange(2) < count
            followed, now = go_on(_start(), followed, frames[0, index], start, (index, there),
                                  np.int32(F), np.int32(direction))  # fmt: skip
            for place, frame in enumerate(window[:count]):
                for s in np.flatnonzero(direction * (frame - slots[0]) > 0):
                    for name, x in now.items():
                        found[name][0, s, frame] = x[0, s, place]
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=1e-4)


@pytest.mark.long
def test_what_a_video_needs_does_not_grow_with_its_length():
    """Frames are encoded inside the loop: 4 times as many need the same working memory, apart from
    the frames and the answers themselves."""
    config = SIZES["micro"]
    structure, state = nnx.split(nnx.eval_shape(lambda: Sam2(config, rngs=Rngs(0))))

    def call(state, frames, tokens, start):
        sam, count = nnx.merge(structure, state), len(frames)
        prompt = Prompt(tokens, start, jnp.ones((1, 1), bool))
        return track(sam, lambda frame: sam.features(frames[frame]), prompt, count, count)

    def working(count):
        shapes = (
            jax.ShapeDtypeStruct((count, SIDE, SIDE, 3), jnp.float32),
            jax.ShapeDtypeStruct((1, 1, 3, config.width), jnp.float32),
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
        )
        compiled = jax.jit(call).lower(state, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = working(16), working(64)
    answers = 48 * 4 * (config.mask_size**2 + 1)
    assert long - short <= 4 * answers, (short, long)
    assert long < 1.5 * short
