"""LaSOT and GOT-10k counts against their definitions and by hand."""

import numpy as np
import pytest

from experiments.benchmarks import metric_oracles
from tpo_jax.evaluation.metrics import region, tracking


def sequence(seed: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (x, y, w, h) with lost frames, labels of which some are not boxes, absence."""
    rng = np.random.default_rng(seed)
    target = np.cumsum(rng.normal(0, 3, (frames, 4)), axis=0) + [150, 100, 40, 30]
    predicted = target + rng.normal(0, rng.choice([0, 3, 15]), target.shape)
    kind = rng.integers(0, 12, frames)
    predicted[kind == 0] = np.nan
    predicted[kind == 1, 2] = 0
    predicted[kind == 2] = target[kind == 2]
    target[kind == 3, 3] = 0
    target[kind == 4, 0] = -2
    return predicted, target, kind >= 10


def test_lasot_equals_the_definition():
    for seed in range(30):
        arguments = sequence(seed, 1 + seed * 3)
        got = tracking.lasot_scores(*arguments)
        expected = metric_oracles.lasot(*(a.tolist() for a in arguments))
        assert got == pytest.approx(expected, abs=1e-9), seed


def test_lasot_by_hand():
    target = np.array([[10.0, 10, 20, 20]] * 5)
    predicted = target + np.array([[9], [0], [20], [3], [0]]) * [1, 0, 0, 0]
    predicted[4] = np.nan  # takes the box before
    absent = np.zeros(5, bool)
    got = tracking.lasot_scores(predicted, target, absent)
    # IoU 1, 1, 0, 17/23, 17/23 (above 0, 0.05 ... 0.7: fifteen of 21 thresholds).
    assert got["success"] == pytest.approx((20 + 20 + 0 + 15 + 15) / 21 / 5)
    assert got["precision"] == 1  # 20 pixels count
    assert got["normalised_precision"] == pytest.approx(4 / 5)  # 3 / 20 of the width
    # Absent frames are not compared, but counted.
    absent[1:] = True
    got = tracking.lasot_scores(predicted, target, absent)
    assert got["precision"] == pytest.approx(1 / 5) and got["success"] == pytest.approx(20 / 21 / 5)


def test_longer_tracks_are_cut_and_shorter_refused():
    predicted, target, absent = sequence(1, 9)
    longer = np.concatenate([predicted, predicted])
    assert tracking.lasot_scores(longer, target, absent) == tracking.lasot_scores(
        predicted, target, absent
    )
    with pytest.raises(ValueError, match=r"expected float\[9, 4\]"):
        tracking.lasot_scores(predicted[:8], target, absent)


def test_got10k_by_hand():
    target = np.array([[0.0, 0, 10, 10]] * 5)
    predicted = np.array([[9, 9, 1, 1], [0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 8], [0] * 4])
    ious = tracking.got10k_ious(predicted, target)
    np.testing.assert_allclose(ious, [1, 0.5, 0.8, 0])
    assert tracking.average_overlap(ious) == pytest.approx(2.3 / 4)
    assert tracking.success_rate(ious) == 0.5  # exactly 0.5 does not count
    assert tracking.success_rate(ious, 0.75) == 0.5
    visible = tracking.got10k_ious(predicted, target, visible=np.array([0, 8, 0, 1, 0]))
    np.testing.assert_allclose(visible, [1, 0.8])
    # Clipped to an image of 6 x 6, both boxes cover it.
    np.testing.assert_allclose(tracking.got10k_ious(predicted, target, bound=(6, 6))[:1], 1)
    empty = np.zeros((2, 4))
    np.testing.assert_array_equal(tracking.got10k_ious(empty, empty), 0)
    with pytest.raises(ValueError, match="at least one counted frame"):
        tracking.success_rate([])


def test_box_accuracy_equals_the_definition():
    rng = np.random.default_rng(0)
    for count in (1, 200):
        target = np.sort(rng.integers(0, 12, (count, 2, 2)), axis=1).reshape(count, 4)
        predicted = np.where(rng.random((count, 1)) < 0.5, target + rng.integers(0, 3, 4), target)
        predicted[::7] = 0  # no prediction
        got = region.region_accuracy(predicted, target).mean()
        expected = metric_oracles.box_accuracy(predicted.tolist(), target.tolist())
        assert got == pytest.approx(expected)
