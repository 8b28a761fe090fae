"""J and F against hand counts and against numbers from the davis2017 evaluation code."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from tpo_jax.evaluation.metrics import mask as metrics

SLOW_MACHINE = hypothesis.settings(
    deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


def ellipses(seed: int, height: int, width: int, count: int = 12) -> np.ndarray:
    """bool[2, count, h, w]: labels and predictions; the first three have empty ones."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    shapes = []
    for _ in range(2 * count):
        cy, cx, ry, rx = rng.random(4) * [height, width, height / 3, width / 3]
        shapes.append(((y - cy) / (ry + 0.5)) ** 2 + ((x - cx) / (rx + 0.5)) ** 2 < 1)
    pair = np.array(shapes).reshape(2, count, height, width)
    keep = rng.random((count, 1, 1)) >= 0.8
    pair[1] = np.where(keep, pair[1], np.roll(pair[0], rng.integers(0, 4, 2), (1, 2)))
    pair[0, 0], pair[1, 1], pair[:, 2] = False, False, False
    return pair


# Made once with davis2017/metrics.py (db_eval_iou, db_eval_boundary) on `ellipses`.
DAVIS = {
    (0, 64, 64): (
        [0, 0, 1, 0, 0.689796, 0.761039, 0, 0, 0.79562, 0.886148, 0.818182, 0.042936],
        [0, 0, 1, 0, 0.47619, 0.438095, 0, 0, 0.769231, 0.77907, 0.785714, 0.21256],
    ),
    (1, 48, 64): (
        [0, 0, 1, 0.433333, 0.280702, 0.604136, 0, 0.107143, 0, 0.018182, 0.469231, 0.59116],
        [0, 0, 1, 0.206486, 0.275, 0.153846, 0, 0.110092, 0, 0.404412, 0.233333, 0.200393],
    ),
    (2, 240, 320): (
        [0, 0, 1, 0.889103, 0.783491, 0.940484, 0.886189, 0.791552, 0, 0, 0.906142, 0.868296],
        [0, 0, 1, 1, 0.836364, 1, 0.877419, 0.964856, 0, 0, 0.846821, 1],
    ),
}


@pytest.mark.parametrize("key", DAVIS)
def test_equals_the_davis_evaluation_code(key):
    target, predicted = ellipses(*key)
    region, contour = DAVIS[key]
    np.testing.assert_allclose(metrics.region_similarity(predicted, target), region, atol=1e-6)
    np.testing.assert_allclose(metrics.boundary_accuracy(predicted, target), contour, atol=1e-6)


def test_hand_counted_square():
    target, predicted = np.zeros((2, 8, 8), bool)
    target[2:6, 2:6] = True
    predicted[2:6, 3:7] = True
    assert metrics.region_similarity(predicted, target) == pytest.approx(12 / 20)
    # One pixel of tolerance (8 x 8 has a short diagonal) covers a shift of one pixel.
    assert metrics.boundary_accuracy(predicted, target) == pytest.approx(1.0)
    # The boundary of a 4 x 4 square is the ring of 5 x 5 towards the origin: 16 pixels.
    assert metrics.boundary(target).sum() == 16


def test_half_of_a_boundary_out_of_reach():
    target, predicted = np.zeros((2, 16, 16), bool)
    target[4:8, 4:8] = True
    predicted[4:8, 4:12] = True
    # Prediction: a ring of 24 pixels, of which two rows of 6 and 3 of the left column are in reach.
    # Label: a ring of 16, of which only the middle of the right column is out of reach.
    score = metrics.boundary_accuracy(predicted, target)
    precision, recall = 15 / 24, 15 / 16
    assert score == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("size, radius", [((40, 40), 1), ((100, 100), 2), ((200, 300), 3)])
def test_a_boundary_matches_within_a_disk(size, radius):
    """A mask of one pixel has four boundary pixels; shifted, some of them still match."""
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            target, predicted = np.zeros((2, *size), bool)
            target[20, 20] = predicted[20 + dy, 20 + dx] = True
            first = [(y, x) for y in (0, 1) for x in (0, 1)]
            second = [(y + dy, x + dx) for y, x in first]
            share = np.mean(
                [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in second) for y, x in first]
            )
            assert metrics.boundary_accuracy(predicted, target) == pytest.approx(share)


def test_boundaries_match_in_their_own_mask_only():
    """Edges at opposite sides of the image, and of the next mask, are not near each other."""
    masks = np.zeros((3, 40, 40), bool)
    masks[0, :, -4:], masks[1, :3], masks[2, -3:] = True, True, True
    target = np.zeros_like(masks)
    target[0, :, :3], target[1, -3:], target[2, :3] = True, True, True
    np.testing.assert_array_equal(metrics.boundary_accuracy(masks, target), 0)


def test_image_and_cumulative_iou():
    shapes = [(0, 24, 20), (1, 10, 40)]  # images of different sizes; some masks are empty
    pairs = [ellipses(*shape)[:, index] for shape in shapes for index in range(12)]
    both = np.array([metrics.areas(predicted, target) for target, predicted in pairs])
    ious, parts, wholes = [], 0, 0
    for target, predicted in pairs:
        pair = (np.asfortranarray(mask.astype(np.uint8)) for mask in (predicted, target))
        codes = [coco.encode(mask) for mask in pair]
        whole = coco.area(coco.merge(codes))
        ious.append(coco.iou(codes[:1], codes[1:], [0])[0, 0] if whole else 1.0)
        parts, wholes = parts + coco.area(coco.merge(codes, intersect=True)), wholes + whole
    assert metrics.mean_iou(*both.T) == pytest.approx(np.mean(ious), abs=1e-9)
    assert metrics.cumulative_iou(*both.T) == pytest.approx(parts / wholes, abs=1e-9)
    assert metrics.mean_iou([0], [0]) == metrics.cumulative_iou([0], [0]) == 1


def test_two_empty_masks_agree_and_one_empty_mask_scores_zero():
    empty = np.zeros((5, 5), bool)
    full = np.ones((5, 5), bool)
    full[0] = False
    for function in (metrics.region_similarity, metrics.boundary_accuracy):
        assert function(empty, empty) == 1
        assert function(empty, full) == 0
        assert function(full, empty) == 0


@SLOW_MACHINE
@hypothesis.given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 20), st.integers(1, 20))
def test_scores_are_symmetric_bounded_and_one_for_equal_masks(seed, share, height, width):
    masks, other = np.random.default_rng(seed).random((2, 3, height, width)) < share
    for function in (metrics.region_similarity, metrics.boundary_accuracy):
        scores = function(masks, other)
        assert scores.shape == masks.shape[:1]
        assert ((scores >= 0) & (scores <= 1)).all()
        np.testing.assert_allclose(scores, function(other, masks))
        np.testing.assert_array_equal(function(masks, masks), 1)


@SLOW_MACHINE
@hypothesis.given(hnp.arrays(bool, (9, 11)))
def test_mask_box_covers_the_mask_and_nothing_smaller_does(mask):
    box = metrics.mask_box(mask)
    if box is None:
        assert not mask.any()
        return
    filled = metrics.box_mask(np.array(box), 9, 11)
    assert not (mask & ~filled).any()
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    assert mask[rows[0]].any() and mask[rows[-1]].any()
    assert mask[:, columns[0]].any() and mask[:, columns[-1]].any()


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.region_similarity(np.zeros((4, 4)), np.zeros((4, 5)))
