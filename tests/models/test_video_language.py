import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.batches import model_batch
from tpo_jax.models.heads import HEADS
from tpo_jax.models.presets import micro
from tpo_jax.models.video_language import FunctionalModel, VideoLanguageModel, order_in_branch

NAMES = ("region", "temporal", "mask")
CONFIG = micro(NAMES)
B, F, K, R, S = 2, 4, 2, 8, 2


@pytest.fixture(scope="module")
def model():
    return FunctionalModel(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def forward(model):
    @jax.jit
    def run(params, batch):
        bound = model.bind(params)
        outputs = bound(batch)
        return outputs, bound.run_heads(outputs, batch)

    return run


def _batch(**changes):
    return model_batch(CONFIG, **({"B": B, "F": F, "K": K, "R": R, "S": S} | changes))


def _paths(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def test_parameters_have_the_agreed_names(model, params):
    paths = _paths(params)
    for path in (
        "vision/layers/temporal_attention/q_proj/kernel", "connector/mlp/fc1/kernel",
        "language/embed/table", "language/layers/self_attn/q_proj/kernel",
        "language/layers/mlp/gate_proj/kernel", "language/layers/input_layernorm/scale",
        "language/final_norm/scale", "language/lm_head/kernel", "task_tokens/region",
        "task_tokens/temporal", "task_tokens/mask", "box_encoder/fc1/kernel",
    ):  # fmt: skip
        assert path in paths, path
    assert {path.split("/")[1] for path in paths if path.startswith("heads/")} == {
        *NAMES, "frame_tokens",
    }
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in _paths(model.abstract()).items()}
    assert shapes == {path: (leaf.shape, leaf.dtype) for path, leaf in paths.items()}
    base = _paths(FunctionalModel(micro()).abstract())
    assert set(base) == {p for p in paths if p.split("/")[0] in ("vision", "connector", "language")}


def test_shapes_and_dtypes(params, forward):
    outputs, predictions = forward(params, _batch())
    visual, D = CONFIG.num_visual_tokens(F), CONFIG.language.width
    assert outputs.encoded.visual.shape == (B, visual, D)
    assert outputs.prefix_hidden.shape == (B, visual + 3, D)
    assert outputs.branch_hidden.shape == (B, K, R, D)
    shapes = {f"{n}/{k}": v.shape for n, p in predictions.items() for k, v in p.items()}
    m, grid = CONFIG.mask_size, CONFIG.vision.stem_grid
    assert shapes == {
        "region/boxes": (B, S, 4), "region/cells": (B, S, grid, grid),
        "temporal/foreground": (B, S, F),
        "temporal/spans": (B, S, F, 2), "temporal/saliency": (B, S, F),
        "temporal/centres": (B, F), "temporal/frame_valid": (B, F),
        "mask/masks": (B, S, F, m, m), "mask/cells": (B, S, F, grid, grid),
        "mask/presence": (B, S, F),
    }  # fmt: skip


def test_an_image_is_a_clip_of_one_frame(params, forward):
    outputs, predictions = forward(params, _batch(F=1))
    assert outputs.encoded.visual.shape[1] == CONFIG.num_visual_tokens(1)
    assert np.all(np.isfinite(outputs.branch_hidden))
    assert predictions["region"]["boxes"].shape == (B, S, 4)


def test_the_answer_depends_on_the_video_and_on_the_users_box(params, forward):
    batch = _batch()
    want = forward(params, batch)[0].branch_hidden
    other = batch | {"frames": batch["frames"][:, ::-1]}
    assert np.abs(forward(params, other)[0].branch_hidden - want).max() > 1e-4
    slots = batch["slots"]
    moved = slots["box"] | {"boxes": slots["box"]["boxes"] + 0.1}
    got = forward(params, batch | {"slots": slots | {"box": moved}})[0].branch_hidden
    at = slots["box"]["index"][0, 0]
    np.testing.assert_array_equal(got[:, 0, :at], want[:, 0, :at])
    assert np.abs(got[:, 0, at] - want[:, 0, at]).max() > 1e-5
    np.testing.assert_array_equal(got[:, 1], want[:, 1])


def test_the_mask_head_reads_the_box_on_the_frame_that_it_is_drawn_on(params, forward):
    batch = _batch()
    want, first = forward(params, batch)
    slots = batch["slots"]
    later = slots["box"] | {"frame": np.array([[0, 0], [2, 0]], np.int32)}
    got, late = forward(params, batch | {"slots": slots | {"box": later}})
    np.testing.assert_array_equal(got.branch_hidden, want.branch_hidden)
    for name in ("masks", "presence"):
        np.testing.assert_array_equal(late["mask"][name][0], first["mask"][name][0])
        assert np.abs(late["mask"][name][1] - first["mask"][name][1]).max() > 1e-5


def test_the_region_head_reads_the_frame_that_is_asked_about(params, forward):
    batch = _batch()
    first = batch["slots"]["region"] | {"frame": np.zeros((B, S), np.int32)}
    frame = np.zeros((B, S), np.int32)
    frame[1] = 2, 0
    boxes = []
    for region in (first, first | {"frame": frame}):
        _, found = forward(params, batch | {"slots": batch["slots"] | {"region": region}})
        boxes.append(found["region"]["boxes"])
    still = np.array([[True, True], [False, True]])
    np.testing.assert_array_equal(boxes[1][still], boxes[0][still])
    assert np.abs(boxes[1][1, 0] - boxes[0][1, 0]).max() > 1e-4


def test_slots_take_the_boxes_of_their_question_in_turn():
    """Branch 0 has the boxes 1 and 2, branch 1 the box 0, branch 2 none."""
    corners = np.arange(4.0)[None, :, None] * np.ones((1, 4, 4))  # the last one is not valid
    box = {"branch": np.array([[1, 0, 0, 0]]), "valid": np.array([[True, True, True, False]]),
           "boxes": corners.astype(np.float32), "frame": np.array([[5, 6, 7, 8]])}  # fmt: skip
    branch, valid = np.array([[0, 1, 0, 1, 0, 2]]), np.ones((1, 6), bool)
    order = order_in_branch(branch, valid)
    assert order.tolist() == [[0, 0, 1, 1, 2, 0]]
    assert order_in_branch(branch, valid & [[False, *[True] * 5]]).tolist() == [[0, 0, 0, 1, 1, 0]]
    slots = {"branch": branch, "order": order}
    found = VideoLanguageModel.drawn_boxes(None, {"slots": {"box": box}}, slots)
    assert found["box_valid"].tolist() == [[True] * 5 + [False]]
    # A third answer to two boxes, and a second to one, read the last of them.
    assert found["boxes"][0, :5, 0].tolist() == [1, 0, 2, 0, 2]
    assert found["box_frame"][0, :5].tolist() == [6, 5, 7, 5, 7]


def test_slot_tokens_are_task_vectors_and_invalid_boxes_are_dropped(model, params):
    bound = model.bind(params)
    tokens = np.full((1, 2, 4), 7, np.int32)
    tokens[0, 1, 2] = CONFIG.tokens["<temp>"]
    box = {
        "branch": np.zeros((1, 1), np.int32), "index": np.zeros((1, 1), np.int32),
        "valid": np.zeros((1, 1), bool), "boxes": np.full((1, 1, 4), 0.3, np.float32),
    }  # fmt: skip
    embeds = bound.embed_branches(tokens, {"box": box})
    np.testing.assert_array_equal(embeds[0, 1, 2], params["task_tokens"]["temporal"])
    plain = params["language"]["embed"]["table"][7]
    np.testing.assert_array_equal(embeds[0, 0, 0], plain)
    valid = bound.embed_branches(tokens, {"box": box | {"valid": np.ones((1, 1), bool)}})
    np.testing.assert_allclose(valid[0, 0, 0], bound.encode_boxes(jnp.full(4, 0.3)), atol=1e-6)


def test_a_prefix_too_short_for_its_video_is_named(model, params):
    bound = model.bind(params)
    with pytest.raises(ValueError, match="prefix of 5 tokens is too short for 4 visual tokens"):
        bound.embed_prefix(jnp.zeros((1, 5), jnp.int32), jnp.zeros((1, 4, 32)))


def test_text_alone_is_looked_up_for_a_prefix(model, params, monkeypatch):
    """What stands at visual positions is neither looked up nor given a gradient."""
    bound, offset, span = model.bind(params), CONFIG.visual_offset, 4
    looked_up, whole = [], bound.embed_tokens

    def embed_tokens(self, tokens):
        looked_up.append(np.asarray(tokens))
        return whole(tokens)

    monkeypatch.setattr(VideoLanguageModel, "embed_tokens", embed_tokens)
    tokens = jnp.arange(5, 5 + offset + span + 3)[None]
    visual = jnp.full((1, span, CONFIG.language.width), 7.0)
    prefix = bound.embed_prefix(tokens, visual)
    text = np.delete(np.asarray(tokens), np.s_[offset : offset + span], axis=1)
    (seen,) = looked_up
    np.testing.assert_array_equal(seen, text)
    np.testing.assert_array_equal(prefix[:, offset : offset + span], visual)
    rest = np.delete(np.asarray(prefix), np.s_[offset : offset + span], axis=1)
    np.testing.assert_array_equal(rest, whole(text))


def test_parameters_that_do_not_fit_are_named(model, params):
    with pytest.raises(ValueError, match="box_encoder/fc1/bias: expected .*, got nothing"):
        model.bind({name: leaf for name, leaf in params.items() if name != "box_encoder"})
    wrong = params | {"extra": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"extra: expected nothing, got \(3,\)"):
        model.bind(wrong)


def _loss(model):
    def total(params, batch):
        bound = model.bind(params)
        outputs = bound(batch)
        predictions = bound.run_heads(outputs, batch)
        terms = {}
        for name, prediction in predictions.items():
            slots = batch["slots"][name]
            terms |= HEADS[name].loss(prediction, slots, slots["valid"])
        return sum(term.mean() for term in terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.fixture(scope="module")
def loss(model):
    return _loss(model)


def test_slots_that_are_not_valid_weigh_nothing_and_keep_gradients_finite(params, loss):
    batch = _batch()
    for slots in batch["slots"].values():
        slots["valid"][:] = False
        for name in ("boxes", "windows", "saliency", "masks"):
            if name in slots:
                slots[name] = np.zeros_like(slots[name])
    (total, terms), gradient = loss(params, batch)
    assert total == 0 and all(term.weight == 0 for term in terms.values())
    for path, leaf in _paths(gradient).items():
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf), err_msg=path)


def test_the_content_of_slots_that_are_not_valid_does_not_matter(params, loss):
    batch, other = _batch(), _batch()
    for slots in other["slots"].values():
        for name in ("boxes", "windows", "masks"):
            if name in slots:
                slots[name][:, 1] = 0
    (a, _), gradient_a = loss(params, batch)
    (b, _), gradient_b = loss(params, other)
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, gradient_a, gradient_b)


def test_head_losses_reach_every_part_of_the_model(params, loss):
    _, gradient = loss(params, _batch())
    # Not read by the heads' losses: logits, tokens that do not occur (the slot tokens here), and
    # the key biases of attention, which cancel.
    untouched = ("language/lm_head", "task_tokens", "k_proj/bias")
    for path, leaf in _paths(gradient).items():
        assert np.all(np.isfinite(leaf)), path
        if not any(name in path for name in untouched):
            assert np.abs(leaf).max() > 0, path


def test_bfloat16_towers_leave_the_heads_float32(params):
    model = FunctionalModel(dataclasses.replace(CONFIG, dtype="bfloat16"))

    @jax.jit
    def run(params, batch):
        bound = model.bind(params)
        outputs = bound(batch)
        return outputs, bound.run_heads(outputs, batch)

    outputs, predictions = run(params, _batch())
    assert outputs.branch_hidden.dtype == jnp.bfloat16
    assert predictions["region"]["boxes"].dtype == jnp.float32
    assert predictions["mask"]["masks"].dtype == jnp.float32


def test_heads_overfit_one_batch(model, params):
    """Every head can fit arbitrary targets of two rows: the path to the weights is whole."""
    batch = _batch(S=1)
    _blobs(batch["slots"]["mask"]["masks"])
    loss = _loss(model)
    optimizer = optax.adam(5e-3)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradient):
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state

    for _ in range(120):
        (_, terms), gradient = loss(params, batch)
        params, state = update(params, state, gradient)
    (_, terms), _ = loss(params, batch)
    means = {name: float(term.mean()) for name, term in terms.items()}
    # Cells share their weight over what a box covers, which leaves the entropy of that: they start
    # at 4.2 and 4.7. Saliency, of noise and with margins, starts at 1.15.
    limits = {
        "region/l1": 0.1, "region/giou": 0.1, "region/cells": 2.3, "temporal/foreground": 0.1,
        "temporal/l1": 0.1, "temporal/giou": 0.15, "temporal/saliency": 0.6, "mask/focal": 0.01,
        "mask/dice": 0.2, "mask/cells": 2.7, "mask/presence": 0.05,
    }  # fmt: skip
    assert {name: means[name] for name in limits if means[name] > limits[name]} == {}


def _blobs(masks):
    """Rectangles that move with the frame, in place of noise; absent in the last frame."""
    masks[:] = 0
    for b in range(masks.shape[0]):
        for f in range(masks.shape[2] - 1):
            masks[b, :, f, 2 + 2 * b : 8 + 2 * b, 1 + f : 7 + f] = 1
