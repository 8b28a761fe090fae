"""Losses of SAM 2 against NumPy, number by number, and what chooses the prompted frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.heads import sam2
from tpo_jax.models.heads.sam2.head import (
    best_frame,
    best_labelled_frame,
    extents,
    labelled_boxes,
)
from tpo_jax.models.heads.sam2.mask_decoder import Decoded, choose

B, S, F, M = 2, 2, 3, 6


def _predictions(rng):
    found = {"prompt_error": rng.uniform(0, 2, (B, S)), "box": rng.normal(size=(B, S, 4)),
             "labelled_box": rng.uniform(0.1, 0.9, (B, S, 4))}  # fmt: skip
    for kind in ("", "still_"):
        asked = rng.random((B, S, F, 4)) < 0.6
        asked[..., 0] |= ~asked.any(-1)
        found |= {
            f"{kind}candidates": 3 * rng.normal(size=(B, S, F, 4, M, M)),
            f"{kind}iou": rng.uniform(0, 1, (B, S, F, 4)),
            f"{kind}presence": 2 * rng.normal(size=(B, S, F)), f"{kind}asked": asked,
        }  # fmt: skip
    return found


def _targets(rng):
    masks = (rng.random((B, S, F, M, M)) < 0.4).astype(np.uint8)
    masks[0, 0, 1] = 0  # absent
    labelled = np.ones((B, S, F), bool)
    labelled[1, 0, 2] = False
    return {"masks": masks, "labelled": labelled}


def _by_hand(found, kind, targets, valid):
    """{term: (total, weight)}, one frame and one mask at a time."""
    names = ("focal", "dice", "iou", "presence")
    sums = {name: np.zeros(2) for name in names}
    for at in np.ndindex(B, S, F):
        if not (valid[at[:2]] and targets["labelled"][at]):
            continue
        mask, logit = targets["masks"][at].astype(bool), found[f"{kind}presence"][at]
        chance = 1 / (1 + np.exp(-logit))
        sums["presence"] += [-np.log(chance if mask.any() else 1 - chance), 1]
        if not mask.any():
            continue
        tried = []
        for k in np.flatnonzero(found[f"{kind}asked"][at]):
            p = 1 / (1 + np.exp(-found[f"{kind}candidates"][at][k]))
            right = np.where(mask, p, 1 - p)
            focal = np.mean(np.where(mask, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right))
            dice = 1 - (2 * p[mask].sum() + 1) / (p.sum() + mask.sum() + 1)
            iou = (mask & (p > 0.5)).sum() / (mask | (p > 0.5)).sum()
            tried.append((20 * focal + dice, focal, dice, abs(found[f"{kind}iou"][at][k] - iou)))
        _, focal, dice, _ = min(tried)
        sums["focal"] += [focal, 1]
        sums["dice"] += [dice, 1]
        sums["iou"] += [np.mean([t[3] for t in tried]), 1]
    return {f"sam2/{kind}{name}": value for name, value in sums.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_terms_are_those_of_numpy(seed):
    rng = np.random.default_rng(seed)
    found, targets = _predictions(rng), _targets(rng)
    valid = np.array([[True, True], [True, False]])
    single = {k: jnp.asarray(v, bool if v.dtype == bool else np.float32) for k, v in found.items()}
    terms = sam2.loss(single, targets, jnp.asarray(valid))
    apart = np.abs(found["box"] - found["labelled_box"])[valid]
    expected = {"sam2/prompt": np.array([found["prompt_error"][valid].sum(), 3]),
                "sam2/box": np.array([apart.sum() / 4, 3])}  # fmt: skip
    for kind in ("", "still_"):
        expected |= _by_hand(found, kind, targets, valid)
    assert set(terms) == set(expected) == set(sam2.published_weights())
    for name, (total, weight) in expected.items():
        assert terms[name].weight == weight, name
        np.testing.assert_allclose(terms[name].total, total, rtol=1e-4, err_msg=name)


def test_the_box_of_an_absent_object_is_minus_one_and_it_has_no_prompt():
    """Slots: seen in the prompted frame; in no labelled one; in another than the prompted one; in
    none, as none is labelled."""
    rng = np.random.default_rng(2)
    found = {name: x.reshape(1, B * S, *x.shape[2:]) for name, x in _predictions(rng).items()}
    found["labelled_box"] = np.zeros((1, 4, 4))
    found["labelled_box"][0, 0] = [0.25, 0.0, 0.75, 0.5]
    masks, labelled = np.zeros((1, 4, F, M, M), np.uint8), np.ones((1, 4, F), bool)
    masks[0, 0, 0, :3, 2:5], masks[0, 2, 1, 0, 0], labelled[0, 3] = 1, 1, False

    def terms(box):
        targets = {"masks": masks, "labelled": labelled}
        return sam2.loss(found | {"box": box}, targets, jnp.ones((1, 4), bool))

    box = jnp.asarray(rng.normal(size=(1, 4, 4)), jnp.float32)
    wanted = np.array([[0.25, 0.0, 0.75, 0.5], [-1.0] * 4])
    assert terms(box)["sam2/box"].weight == 2 and terms(box)["sam2/prompt"].weight == 1
    mean = np.abs(np.asarray(box)[0, :2] - wanted).mean()
    np.testing.assert_allclose(terms(box)["sam2/box"].mean(), mean, rtol=1e-5)
    prompt = terms(box)["sam2/prompt"].total
    np.testing.assert_allclose(prompt, found["prompt_error"][0, 0], rtol=1e-6)
    gradient = jax.grad(lambda box: terms(box)["sam2/box"].total)(box)
    np.testing.assert_allclose(gradient[0, :2], np.sign(box[0, :2] - wanted) / 4, rtol=1e-6)
    assert not np.any(gradient[0, 2:])


def test_the_labelled_box_is_that_of_the_prompted_frame():
    masks = np.zeros((1, 2, 2, 4, 8), np.uint8)
    masks[0, 0, 0], masks[0, 0, 1, 1:3, 2:5] = 1, 1
    found = labelled_boxes({"masks": masks}, jnp.array([[1, 0]]))
    np.testing.assert_allclose(found, [[[0.25, 0.25, 0.625, 0.75], [0] * 4]])


def _decoded(presence, iou, masks=None):
    presence, iou = np.asarray(presence, np.float32), np.asarray(iou, np.float32)
    masks = np.full((*iou.shape, 2, 2), 9.0) if masks is None else masks
    return Decoded(*map(jnp.asarray, (masks, iou, presence)), jnp.zeros((*iou.shape, 1)))


def test_the_prompted_frame_is_the_one_that_is_surest_and_not_the_first():
    presence = [[[-5.0, 3.0, 3.0, 9.0]]]  # the last frame is a filling
    iou = np.array([0.9, 0.4, 0.8, 0.99])[None, None, :, None] * np.ones(4)
    valid = jnp.array([[True, True, True, False]])
    assert best_frame(_decoded(presence, iou), valid).tolist() == [[2]]


def test_in_training_it_is_where_most_of_the_object_is_labelled():
    masks = np.zeros((1, 2, 3, 4, 4), np.uint8)
    masks[0, 0, 0, 0, 0], masks[0, 0, 1, :2] = 1, 1
    masks[0, 0, 2] = 1  # not labelled
    targets = {"masks": masks, "labelled": np.array([[[True, True, False], [True] * 3]])}
    found = best_labelled_frame(targets, jnp.ones((1, 3), bool), jnp.array([[0, 2]]))
    assert found.tolist() == [[1, 2]]


def test_extents_are_tight_and_zero_where_nothing_is():
    masks = np.zeros((2, 4, 8), np.uint8)
    masks[0, 1:3, 2:5] = 1
    np.testing.assert_allclose(extents(jnp.asarray(masks)), [[0.25, 0.25, 0.625, 0.75], [0] * 4])


def test_an_unstable_mask_of_a_closed_prompt_gives_way_to_the_best_of_three():
    iou = np.array([0.9, 0.1, 0.3, 0.2])[None, None] * np.ones((1, 3, 1))
    masks = np.full((1, 3, 4, 2, 2), 9.0)
    masks[0, 1, 0, 0] = 0.01  # inside at -0.05 only
    answer, told = choose(_decoded(np.zeros((1, 3)), iou, masks), jnp.array([[True, True, False]]))
    assert answer.tolist() == [[0, 2, 2]] and told.tolist() == [[0, 0, 2]]
