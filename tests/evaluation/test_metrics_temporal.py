"""R1, mIoU and mAP against hand-computed numbers and an independent evaluation of the curve."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from metric_inputs import slow_query_ap

from tpo_jax.evaluation.metrics import temporal as metrics

WINDOW = st.tuples(st.floats(0, 60, width=16), st.floats(0, 60, width=16)).map(sorted)
WINDOWS = st.lists(WINDOW, min_size=1, max_size=12)


def test_window_iou_by_hand():
    np.testing.assert_allclose(
        metrics.window_iou([[0, 4], [0, 4], [2, 2], [0, 4]], [[2, 6], [5, 6], [2, 2], [1, 2]]),
        [2 / 6, 0, 0, 1 / 4],
    )


def test_top1_takes_the_best_score_and_the_best_label():
    windows, scores = [[0, 2], [4, 8], [10, 20]], [0.1, 0.9, 0.5]
    assert metrics.top1_iou(windows, scores, [[0, 2], [5, 8], [30, 40]]) == pytest.approx(3 / 4)
    assert metrics.top1_iou(np.zeros((0, 2)), [], [[0, 2]]) == 0


def test_average_precision_by_hand():
    # Scores put a miss first, then both labels: precision 1/2, 2/3 -> envelope 2/3 at both recalls.
    windows, scores = [[0, 10], [20, 30], [50, 60]], [0.5, 0.9, 0.7]
    targets = [[0, 10], [50, 60]]
    np.testing.assert_allclose(
        metrics.query_average_precision(windows, scores, targets), 2 / 3, atol=1e-12
    )
    # A second window on the same label is a false positive; the other label is never found.
    twice = metrics.query_average_precision([[0, 10], [0, 10]], [0.9, 0.8], targets)
    np.testing.assert_allclose(twice, 0.5)
    # IoU 0.8 counts up to the threshold 0.80.
    loose = metrics.query_average_precision([[0, 8]], [1.0], [[0, 10]])
    np.testing.assert_allclose(loose, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0])


def test_only_ten_windows_count():
    windows = [[100 + i, 100.5 + i] for i in range(10)] + [[0, 10]]
    assert metrics.query_average_precision(windows, np.ones(11), [[0, 10]]).max() == 0


def test_a_query_without_label_window_is_refused():
    with pytest.raises(ValueError, match="at least one label window"):
        metrics.top1_iou([[0, 1]], [1.0], [])


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(WINDOWS, WINDOWS, st.integers(0, 2**31))
def test_average_precision_equals_the_oracle(windows, targets, seed):
    scores = np.random.default_rng(seed).integers(0, len(windows), len(windows)).astype(float)
    np.testing.assert_allclose(
        metrics.query_average_precision(windows, scores, targets),
        slow_query_ap(windows, scores, targets),
        atol=1e-9,
    )


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(WINDOW, WINDOW)
def test_iou_is_symmetric_and_bounded(first, second):
    iou = metrics.window_iou(first, second)
    assert 0 <= iou <= 1
    assert iou == metrics.window_iou(second, first)
    if first[1] > first[0]:
        assert metrics.window_iou(first, first) == 1
