"""HIT@1 and highlight mAP by hand, and against an independent average precision."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tpo_jax.evaluation.metrics import highlight as metrics


def test_average_precision_by_hand():
    positive = np.array([0, 1, 0, 1], bool)
    # Order 0, 1, 3, 2: precision at the two positives 1/2 and 2/3, interpolated to 2/3 and 2/3.
    assert metrics.highlight_average_precision([0.9, 0.8, 0.1, 0.5], positive) == pytest.approx(
        2 / 3
    )
    assert metrics.highlight_average_precision([0.1, 0.9, 0.2, 0.8], positive) == 1


def test_tied_scores_share_one_threshold():
    # All four clips tie: one point of the curve, precision 1/2, although there are two positives.
    assert metrics.highlight_average_precision(np.zeros(4), [0, 1, 0, 1]) == pytest.approx(0.5)


def test_raters_without_and_with_only_positive_clips():
    positive = np.array([[0, 1, 0], [0, 1, 1]], bool)  # clips x raters: none, all, second clip
    assert metrics.highlight_average_precision([0.2, 0.1], positive) == pytest.approx(
        (0 + 1 + 0.5) / 3
    )


def test_predictions_are_cut_and_padded():
    positive = np.array([0, 1, 0], bool)
    assert metrics.highlight_average_precision([-1.0], positive) == pytest.approx(1 / 2)
    assert metrics.highlight_average_precision([0.1, 0.9, 0.2, 5.0], positive) == 1
    # HIT@1 looks at the uncut prediction: a best clip beyond the end misses.
    assert metrics.highlight_hit([0.1, 0.9, 0.2, 5.0], positive) == 0
    assert metrics.highlight_hit([0.1, 0.9, 0.2], positive) == 1


def test_any_rater_makes_a_hit():
    assert metrics.highlight_hit([0.9, 0.1], np.array([[0, 1, 0], [0, 0, 0]], bool)) == 1


def test_frames_are_averaged_into_clips():
    times = np.array([0.25, 0.75, 1.25, 2.5, 6.5])
    out = metrics.clip_scores(times, np.array([0.0, 0.3, 0.6, 1.0, 0.2]), 0.0, 4)
    np.testing.assert_allclose(out, [0.3, 1.0, 0.2, 0.2])  # the third clip has no frame
    with pytest.raises(ValueError, match="one value per frame time"):
        metrics.clip_scores(times, np.zeros(2), 0.0, 4)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_average_precision_equals_the_oracle(rows):
    scores = np.array([score for score, _ in rows], float)
    positive = np.array([flag for _, flag in rows])
    hypothesis.assume(positive.any() and not positive.all())
    curve = []  # (found, precision) at each distinct score, from strict to loose
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        curve.append((positive[chosen].sum(), positive[chosen].mean()))
    points = []
    for index, (found, _) in enumerate(curve):
        if found > (curve[index - 1][0] if index else 0):
            points.append(max(precision for _, precision in curve[index:]))
    got = metrics.highlight_average_precision(scores, positive)
    assert got == pytest.approx(np.mean(points))
