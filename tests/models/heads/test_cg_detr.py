"""The network of the CG-DETR head at the micro size.

One compiled program serves the long tests: compiling its gradient takes most of their time.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from fake_batches import bucket, micro, random_batch
from flax import nnx

from tpo_jax.models.config import ClipFeaturesConfig
from tpo_jax.models.heads import HEADS, ClipInfo, HeadInputs, cg_detr, heads_of
from tpo_jax.models.heads.geometry import nms_1d
from tpo_jax.models.layers import Rngs
from tpo_jax.models.vision import VisionFeatures
from tpo_jax.parallel.paths import flatten, unflatten

CONFIG = micro(("cg_detr",))
B, S, F, R = 4, 2, 6, 5
WEIGHTS = cg_detr.published_weights()
# Terms that do not see all of slot state, prompt and patches.
READS = {"cg_detr/orthogonal": (True, True, False), "cg_detr/clips": (True, False, True)}
# No gradient at first: what is added to all keys of a softmax; the empty queries of the first
# decoder layer; the layers before the last one of `refine`, which starts at 0.
BLIND = r"/k(_proj|_place)?/bias$|layer0/self_(proj|norm)/|layer0/cross_proj/q/|/refine/"


def _head():
    return cg_detr.CgDetrHead(CONFIG, rngs=Rngs(0))


STRUCTURE = nnx.graphdef(nnx.eval_shape(_head))


def _run(params, inputs):
    return nnx.merge(STRUCTURE, nnx.State(jax.tree.map(nnx.Param, params)))(inputs)


def _inputs(seed=0, **changes):
    """Random features; videos 0, 0, 1, 1; every slot valid, the last frames of row 1 are not."""
    rng = np.random.default_rng(seed)
    shapes = bucket(B, frames=F, slots={"temporal": S}, windows=2)
    batch = random_batch(shapes, CONFIG, seed)
    frame_valid = np.arange(F) < np.array([[6], [4], [6], [6]])
    slots = batch["slots"]["temporal"]
    slots["valid"][:] = True
    slots["saliency"][:, 0] = -1  # from windows; the others have ratings

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    features = VisionFeatures(normal(B, F, 8, 8, 16), normal(B, F, 4, 4, 32))
    width = CONFIG.language.width
    prompt_valid = np.arange(R) < np.array([[[5], [3]]])
    inputs = HeadInputs(
        normal(B, S, width), features, None, frame_valid, None, prompt=normal(B, S, R, width),
        prompt_valid=np.broadcast_to(prompt_valid, (B, S, R)), targets=slots,
        video_ids=batch["video_ids"],
    )  # fmt: skip
    return dataclasses.replace(inputs, **changes)


def _with_targets(inputs, **changes):
    return dataclasses.replace(inputs, targets=inputs.targets | changes)


@functools.cache
def _start():
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(_head())))()
    return jax.tree.map(np.asarray, params)


@functools.cache
def _program():
    def total(params, read, inputs, weights):
        slot_states, prompt, patches = read
        features = VisionFeatures(inputs.features.stem, patches)
        inputs = dataclasses.replace(
            inputs, slot_states=slot_states, prompt=prompt, features=features
        )
        predictions = _run(params, inputs)
        terms = cg_detr.loss(predictions, inputs.targets, inputs.targets["valid"])
        value = sum(weights[name] * term.mean() for name, term in terms.items())
        return value, (terms, predictions)

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(both)


def _terms(inputs, params=None, weights=None):
    """(terms, predictions, gradients of parameters and of what the head reads), as numpy."""
    weights = {name: np.float32(value) for name, value in (weights or WEIGHTS).items()}
    read = (inputs.slot_states, inputs.prompt, inputs.features.patches)
    (_, (terms, predictions)), gradients = _program()(params or _start(), read, inputs, weights)
    return jax.device_get((terms, predictions, gradients))


@pytest.mark.long
def test_every_term_has_a_gradient_and_the_text_is_read():
    none = dict.fromkeys(WEIGHTS, 0.0)
    for name in WEIGHTS:
        terms, _, (gradients, read) = _terms(_inputs(), weights=none | {name: 1.0})
        assert terms[name].weight > 0, name
        leaves = flatten(gradients)
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values()), name
        assert max(np.abs(leaf).max() for leaf in leaves.values()) > 1e-6, name
        reads = READS.get(name, (True, True, True))
        assert tuple(bool(np.abs(x).max()) for x in read) == reads, name
    _, _, (gradients, _) = _terms(_inputs())
    blind = {path for path, leaf in flatten(gradients).items() if not np.abs(leaf).max()}
    assert not {path for path in blind if not re.search(BLIND, path)}


@pytest.mark.long
def test_what_is_padding_is_not_read():
    inputs = _inputs()
    stem, patches = inputs.features.stem, np.array(inputs.features.patches)
    patches[~inputs.frame_valid] = 50.0
    prompt = np.array(inputs.prompt)
    prompt[~inputs.prompt_valid] = 50.0
    other = dataclasses.replace(inputs, prompt=prompt, features=VisionFeatures(stem, patches))
    terms, predictions, _ = _terms(inputs)
    got, changed, _ = _terms(other)
    for name, term in terms.items():
        assert got[name].total == pytest.approx(term.total, rel=1e-4, abs=1e-5), name
    for name in ("logits", "spans"):
        np.testing.assert_allclose(changed[name], predictions[name], atol=1e-4)
    shown = np.broadcast_to(inputs.frame_valid[:, None], (B, S, F))
    got, expected = (p["saliency"][shown] for p in (changed, predictions))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.long
def test_terms_add_up_over_rows_unless_they_are_coupled():
    """What one half of the rows gives does not depend on the other half."""
    inputs = _inputs()
    rows = np.broadcast_to(np.arange(B)[:, None] % 2 == 0, (B, S))
    whole, one, other = (_terms(_with_targets(inputs, valid=valid))[0]
                         for valid in (np.ones_like(rows), rows, ~rows))  # fmt: skip
    for name, term in whole.items():
        assert one[name].weight + other[name].weight == term.weight, name
        apart = float(one[name].total + other[name].total)
        if name in HEADS["cg_detr"].coupled:
            assert apart != pytest.approx(float(term.total), rel=1e-6), name
        else:
            assert apart == pytest.approx(float(term.total), rel=1e-4), name


@pytest.mark.long
def test_rows_of_one_video_are_no_negatives_of_each_other():
    inputs = _inputs(video_ids=np.full(B, 3, np.uint32))
    terms, predictions, _ = _terms(inputs)
    assert not predictions["negative"].any()
    assert terms["cg_detr/negative"].weight == terms["cg_detr/attention_negative"].weight == 0
    assert terms["cg_detr/rank"].weight == terms["cg_detr/align"].weight > 0
    assert all(np.isfinite(term.total) for term in terms.values())


@pytest.mark.long
def test_slots_that_are_not_valid_weigh_nothing():
    inputs = _with_targets(_inputs(), valid=np.zeros((B, S), bool))
    terms, _, (gradients, _) = _terms(inputs)
    assert all(term.total == 0 and term.weight == 0 for term in terms.values())
    assert all(not np.any(leaf) for leaf in flatten(gradients).values())


@pytest.mark.long
def test_overfits_one_batch():
    inputs = _inputs()
    params = dict(flatten(_start()))
    mean, square = (dict.fromkeys(params, 0.0) for _ in range(2))
    first = None
    for step in range(1, 401):
        terms, predictions, (gradients, _) = _terms(inputs, unflatten(params))
        first = first or terms
        for path, gradient in flatten(gradients).items():  # Adam
            mean[path] = 0.9 * mean[path] + 0.1 * gradient
            square[path] = 0.99 * square[path] + 0.01 * gradient**2
            size = np.sqrt(square[path] / (1 - 0.99**step)) + 1e-6
            params[path] = params[path] - 2e-3 * mean[path] / (1 - 0.9**step) / size
            params[path] = params[path].astype(np.float32)
    means = {name: float(term.mean()) for name, term in terms.items()}
    assert means["cg_detr/l1"] < 0.03 and means["cg_detr/giou"] < 0.2, means
    assert means["cg_detr/label"] < 0.05, means
    assert means["cg_detr/margin"] < 0.1 and means["cg_detr/negative"] < 0.5, means
    assert means["cg_detr/rank"] < 0.8 * float(first["cg_detr/rank"].mean()), means
    for b in range(B):
        clip = ClipInfo(0.0, 1.0, np.arange(F) / F, inputs.frame_valid[b], 8, 8)
        for s in range(S):
            one = {name: value[b, s] for name, value in predictions.items() if value.ndim > 2}
            start, end, _ = cg_detr.decode(one, clip)["windows"][0]
            assert np.abs(inputs.targets["windows"][b, s, 0] - [start, end]).max() < 0.1


def test_what_the_losses_need_must_be_given():
    params = _start()

    def run(**changes):
        jax.eval_shape(lambda: _run(params, _inputs(**changes)))

    with pytest.raises(ValueError, match="HeadInputs.prompt is missing"):
        run(prompt=None)
    with pytest.raises(ValueError, match="batch\\['video_ids'\\]"):
        run(video_ids=None)


def test_it_answers_the_task_of_the_light_head_but_not_beside_it():
    assert heads_of(("mask", "cg_detr")) == {"mask": "mask", "temporal": "cg_detr"}
    with pytest.raises(ValueError, match="'temporal' and 'cg_detr' both answer 'temporal'"):
        heads_of(("cg_detr", "region", "temporal"))


def test_decode_suppresses_and_keeps_several_windows_in_seconds():
    spans = np.array([[0.5, 0.2], [0.51, 0.2], [0.1, 0.4], [0.9, 0.1]])
    logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    prediction = {
        "spans": np.stack([spans * 0, spans]), "logits": np.stack([-logits, logits]),
        "saliency": np.array([0.0, 2.0, -2.0]),
    }  # fmt: skip
    clip = ClipInfo(10.0, 20.0, np.array([11.0, 12.0, 13.0]), np.array([True, True, False]), 8, 8)
    result = cg_detr.decode(prediction, clip)
    windows = np.array(result["windows"])
    # The second overlaps the first by 0.9; the third is cut to the clip.
    np.testing.assert_allclose(windows[:, :2], [[14.0, 16.0], [10.0, 13.0], [18.5, 19.5]])
    np.testing.assert_allclose(windows[:, 2], 1 / (1 + np.exp([-2.0, 0.0, 1.0])))
    assert result["times"] == [11.0, 12.0] and len(result["saliency"]) == 2
    assert len(nms_1d(spans[:2, ::-1] * 0, np.ones(2), iou=0.7)) == 2  # empty spans share nothing


@pytest.mark.long
def test_weights_count_labels_only():
    """Otherwise a run with micro-batches would need the whole forward pass for its weights."""

    def weights(params, inputs):
        predictions = _run(params, inputs)
        terms = cg_detr.loss(predictions, inputs.targets, inputs.targets["valid"])
        return {name: term.weight for name, term in terms.items()}

    compiled = jax.jit(weights).lower(_start(), _inputs()).compile()
    assert "dot(" not in compiled.as_text() and "while(" not in compiled.as_text()
    assert all(weight > 0 for weight in compiled(_start(), _inputs()).values())


GIVEN = dataclasses.replace(CONFIG, clip_features=ClipFeaturesConfig(24, 2.0, "by hand"))


def test_given_features_stand_in_for_the_patches_as_published():
    """[features; start, end] through the projections, in float64; no parameter of patches."""
    head = cg_detr.CgDetrHead(GIVEN, rngs=Rngs(0))
    assert not {"patch_proj", "patch_norm", "pool"} & set(nnx.to_pure_dict(nnx.state(head)))
    assert head.clip_proj.linear1.kernel.shape == (24 + 2, CONFIG.head.width)
    given = np.random.default_rng(1).normal(size=(B, F, 24)).astype(np.float32)
    inputs = _inputs(clip_features=given, targets=None, features=None)
    clips = head._clips(inputs, np.zeros((B, S, CONFIG.head.width), np.float32))
    got = np.asarray(clips.states).reshape(B, S, F, -1)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    def linear(x, layer):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])

    part = head.clip_proj
    for b, count in enumerate(inputs.frame_valid.sum(axis=1)):
        ends = np.stack([np.arange(count), np.arange(1, count + 1)], axis=-1) / count
        x = np.concatenate([given[b, :count].astype(np.float64), ends], axis=-1)
        x = np.maximum(linear(norm(x, part.norm1), part.linear1), 0)
        x = linear(norm(x, part.norm2), part.linear2) + np.asarray(head.embed["kinds"][1])
        for s in range(S):
            np.testing.assert_allclose(got[b, s, :count], x, atol=2e-5)


def test_given_features_must_be_given():
    head = nnx.eval_shape(lambda: cg_detr.CgDetrHead(GIVEN, rngs=Rngs(0)))
    with pytest.raises(ValueError, match="HeadInputs.clip_features is missing; this model reads"):
        nnx.eval_shape(lambda head: head(_inputs(targets=None)), head)
