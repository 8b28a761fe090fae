import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.models.heads.geometry import (
    box_cxcywh_to_xyxy,
    box_giou,
    soft_nms_1d,
    sorted_corners,
    span_giou,
)

_unit = st.floats(0.0, 1.0, width=32)
_box = st.tuples(_unit, _unit, _unit, _unit)


def test_known_overlaps():
    a = jnp.array([0.0, 0.0, 2.0, 2.0])
    iou, giou = box_giou(a, jnp.array([1.0, 1.0, 3.0, 3.0]))
    # Intersection 1, union 7, hull 9.
    np.testing.assert_allclose([iou, giou], [1 / 7, 1 / 7 - 2 / 9], rtol=1e-6)
    iou, giou = span_giou(jnp.array([0.0, 2.0]), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose([iou, giou], [0.0, -1 / 4], rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(_box, _box)
def test_giou_is_symmetric_bounded_and_blind_to_the_order_of_corners(a, b):
    a, b = jnp.array(a), jnp.array(b)
    iou, giou = box_giou(a, b)
    assert -1.0 - 1e-5 <= giou <= iou + 1e-5 and 0.0 <= iou <= 1.0 + 1e-5
    np.testing.assert_allclose(box_giou(b, a)[1], giou, atol=1e-6)
    swapped = jnp.array([a[2], a[1], a[0], a[3]])
    np.testing.assert_allclose(box_giou(swapped, b)[1], giou, atol=1e-6)


@pytest.mark.parametrize(
    "box", [(0.1, 0.1, 0.2, 0.2), (0.9, 0.9, 0.1, 0.8), (0.5, 0.5, 0.5, 0.5)]
)
def test_giou_has_a_finite_gradient_even_for_distant_inverted_and_empty_boxes(box):
    wanted = jnp.array([0.6, 0.6, 0.9, 0.9])
    gradient = jax.grad(lambda x: box_giou(x, wanted)[1])(jnp.array(box))
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


def test_corners():
    box = box_cxcywh_to_xyxy(jnp.array([0.5, 0.4, 0.2, 0.6]))
    np.testing.assert_allclose(box, [0.4, 0.1, 0.6, 0.7], atol=1e-6)
    np.testing.assert_array_equal(sorted_corners(jnp.array([3, 1, 2, 5])), [2, 1, 3, 5])


def test_soft_nms_keeps_separate_windows_and_demotes_overlapping_ones():
    spans = np.array([[0.0, 0.4], [0.02, 0.4], [0.6, 0.8]])
    scores = np.array([0.9, 0.85, 0.5])
    kept = soft_nms_1d(spans, scores, sigma=0.5, min_score=0.2, limit=10)
    assert [window[:2] for window in kept] == [(0.0, 0.4), (0.6, 0.8)]
    # exp(-0.95^2 / 0.5) of its score is left to the second.
    everything = soft_nms_1d(spans, scores, sigma=0.5, min_score=0.0, limit=10)
    assert everything[2][2] == pytest.approx(0.85 * np.exp(-(0.95**2) / 0.5), rel=1e-6)
    assert len(soft_nms_1d(spans, scores, sigma=0.5, min_score=0.0, limit=1)) == 1
    assert len(soft_nms_1d(spans, scores * 0.0, sigma=0.5, min_score=0.2, limit=10)) == 1
