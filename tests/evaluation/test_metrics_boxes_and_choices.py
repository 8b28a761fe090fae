"""Region accuracy, tracking success, option likelihood and preference by hand."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from pycocotools import mask as coco

from tpo_jax.evaluation.metrics import preference, qa, region, tracking

BOX = st.tuples(*[st.integers(0, 40)] * 4).map(
    lambda v: [min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1]
)


def test_box_iou_by_hand():
    boxes = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [5, 5, 6, 6], [1, 1, 1, 1]])
    np.testing.assert_allclose(region.box_iou(boxes, np.array([0, 0, 2, 1])), [0.5, 0.5, 0, 0])
    assert region.region_accuracy([0, 0, 2, 2], [0, 0, 2, 1]) == 1  # exactly 0.5 counts
    assert region.region_accuracy([0, 0, 2, 2.01], [0, 0, 2, 1]) == 0


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(BOX, BOX)
def test_box_iou_equals_pycocotools(first, second):
    as_xywh = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (first, second)]
    expected = coco.iou(np.array(as_xywh[:1], float), np.array(as_xywh[1:], float), [0])[0, 0]
    assert region.box_iou(first, second) == pytest.approx(expected)


def test_success_area_by_hand():
    # IoU 0.5 lies strictly above the ten thresholds 0, 0.05 ... 0.45; 1.0 above 20; 0 above none.
    assert tracking.success_auc([0.5]) == pytest.approx(10 / 21)
    assert tracking.success_auc([1.0]) == pytest.approx(20 / 21)
    assert tracking.success_auc([0.5, 1.0, 0.0]) == pytest.approx(30 / 63)
    with pytest.raises(ValueError, match="at least one counted frame"):
        tracking.success_auc([])


def test_track_skips_the_given_frame_and_absent_objects():
    box, other = [0, 0, 1, 1], [0, 0, 1, 0.5]
    ious = tracking.track_ious([None, other, None, box, other], [None, box, box, None, box])
    np.testing.assert_allclose(ious, [0.0, 0.5])
    with pytest.raises(ValueError, match="1 predicted frames for 2"):
        tracking.track_ious([box], [box, box])


def test_options():
    assert qa.option_correct([-3.0, -1.0, -2.0], 1) == 1
    assert qa.option_correct([-3.0, -1.0, -2.0], 0) == 0
    assert qa.option_correct([-1.0, -1.0, -1.0, -2.0], 2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="NaN"):
        qa.option_correct([np.nan, 0.0], 1)
    with pytest.raises(ValueError, match="holding answer 2"):
        qa.option_correct([0.0, 1.0], 2)


def test_preference():
    assert preference.preference_correct(-1.0, -2.0) == 1
    assert preference.preference_correct(-2.0, -1.0) == 0
    assert preference.preference_correct(-2.0, -2.0) == 0.5
    with pytest.raises(ValueError, match="NaN"):
        preference.preference_correct(float("nan"), 0.0)
