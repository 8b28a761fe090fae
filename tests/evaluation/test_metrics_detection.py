"""mAP@tIoU against the definition, class by class, with ties, duplicates and empty segments."""

import numpy as np
import pytest
from metric_inputs import detection as detection_input

from experiments.benchmarks import metric_oracles
from tpo_jax.evaluation.metrics import detection as metrics


def arrays(results, database):
    """Arguments of `average_precision`, and the names of the classes."""
    videos = {name: index for index, name in enumerate([*database, *results])}
    rows = [(video, row) for video, entry in database.items() for row in entry]
    guesses = [(video, row) for video, entry in results.items() for row in entry]
    classes = list(dict.fromkeys(row["label"] for _, row in rows))
    guesses = [(video, row) for video, row in guesses if row["label"] in classes]
    return [
        np.array([row["segment"] for _, row in guesses]).reshape(-1, 2),
        np.array([row["score"] for _, row in guesses]),
        np.array([classes.index(row["label"]) for _, row in guesses], int),
        np.array([videos[video] for video, _ in guesses], int),
        np.array([row["segment"] for _, row in rows]),
        np.array([classes.index(row["label"]) for _, row in rows]),
        np.array([videos[video] for video, _ in rows]),
    ], classes


@pytest.mark.parametrize("grid", [0.0, 5.0])
@pytest.mark.parametrize("videos", [1, 2, 12])
@pytest.mark.parametrize("protocol", ["activitynet", "thumos14_210_seconds"])
def test_equals_the_definition(grid, videos, protocol):
    thresholds = metrics.PROTOCOLS[protocol].thresholds
    compared = 0
    for seed in range(6):
        results, database = detection_input(seed, videos, grid)
        if not any(database.values()):
            continue
        columns, classes = arrays(results, database)
        expected = metric_oracles.detection_table(results, database, thresholds)
        got = metrics.average_precision(*columns, thresholds)
        np.testing.assert_allclose(got, [expected[c] for c in classes], atol=1e-9)
        compared += got.size
    assert compared


def test_by_hand():
    targets, labels, videos = [[0, 10], [20, 30], [0, 10]], [0, 0, 1], [0, 0, 0]
    # A miss, a hit, a second window on the same label, then IoU 0.8 on the other label.
    segments, scores = [[50, 60], [0, 10], [0, 10], [20, 28]], [0.9, 0.8, 0.7, 0.6]
    got = metrics.average_precision(segments, scores, [0] * 4, [0] * 4, targets, labels, videos)
    np.testing.assert_allclose(got[0], [0.5] * 7 + [0.25] * 3)  # both, or only the first label
    np.testing.assert_array_equal(got[1], 0)  # a class that is predicted nowhere
    # The same windows in a video without labels are false positives.
    other = metrics.average_precision(segments, scores, [0] * 4, [7] * 4, targets, labels, videos)
    np.testing.assert_array_equal(other, 0)


def test_no_prediction_scores_zero():
    empty = np.zeros(0)
    got = metrics.average_precision(empty, empty, empty, empty, [[0, 1]], [0], [0])
    np.testing.assert_array_equal(got, np.zeros((1, 10)))


def test_segments_without_length_match_each_other():
    """0/0 fails no comparison in the official program, wherever the two segments lie."""
    got = metrics.average_precision([[3, 3]], [1.0], [0], [0], [[8, 8]], [0], [0])
    np.testing.assert_array_equal(got, 1)


def test_equal_scores_and_equal_overlaps_take_the_later_one():
    # The later of two equal scores goes first: a hit at rank 1, not at rank 2.
    got = metrics.average_precision([[5, 9], [0, 4]], [1, 1], [0, 0], [0, 0], [[0, 4]], [0], [0])
    np.testing.assert_array_equal(got, 1)
    # [5, 15] overlaps both labels by 1/3 and claims the later, so that [0, 10] finds its own.
    segments, targets, same = [[5, 15], [0, 10]], [[0, 10], [10, 20]], [0, 0]
    got = metrics.average_precision(segments, [2, 1], same, same, targets, same, same, (0.3,))
    np.testing.assert_array_equal(got, 1)


def test_report_names_thresholds_and_averages():
    protocol = metrics.PROTOCOLS["thumos14_210_seconds"]
    precision = np.tile(np.arange(7) / 10, (2, 1))
    found = metrics.report(precision, protocol)
    assert found["mAP@0.3"] == pytest.approx(20)
    assert found["mAP@0.1:0.5"] == pytest.approx(20)
    assert found["mAP@0.3:0.7"] == pytest.approx(40)
    assert found["mAP@0.1:0.7"] == pytest.approx(30)
    found = metrics.report(np.ones((1, 10)), metrics.PROTOCOLS["activitynet"])
    assert list(found)[0] == "mAP@0.5" and list(found)[-1] == "mAP@0.5:0.95"


def test_rounding_to_snippets_is_half_to_even():
    np.testing.assert_array_equal(metrics.round_to_snippets([[0.32, 0.96]]), [[0, 2]])
    np.testing.assert_array_equal(metrics.round_to_snippets([[0.65, 1.28]]), [[1, 2]])


def test_bad_arguments_are_named():
    good = dict(
        segments=[[0, 1]], scores=[1.0], labels=[0], videos=[0],
        targets=[[0, 1]], target_labels=[0], target_videos=[0],
    )  # fmt: skip
    for change, message in (
        ({"segments": [[0, np.nan]]}, r"segments\[0\]"),
        ({"scores": [np.inf]}, "scores"),
        ({"labels": [1]}, "classes 0..0"),
        ({"target_labels": [1]}, "every class from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.average_precision(**(good | change))
