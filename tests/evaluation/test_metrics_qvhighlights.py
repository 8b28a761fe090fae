"""The QVHighlights table against its definition: every key, every length group, every rating."""

import numpy as np
import pytest
from metric_inputs import leaves, moment_columns, qvhighlights

from experiments.benchmarks import metric_oracles
from tpo_jax.evaluation import submissions
from tpo_jax.evaluation.metrics import qvhighlights as metrics
from tpo_jax.evaluation.metrics import temporal


@pytest.mark.parametrize("grid", [0.0, 2.0, 15.0])
@pytest.mark.parametrize("queries", [1, 40])
def test_equals_the_definition(grid, queries):
    for seed in range(3):
        submission, labels = qvhighlights(seed, queries, grid)
        expected = metric_oracles.moment_table(submission, labels)
        expected |= metric_oracles.highlight_table(submission, labels)
        got = submissions.score_qvhighlights(submission, labels)
        brief = got.pop("brief")
        got, expected = dict(leaves(got)), dict(leaves(expected))
        assert got.keys() == expected.keys() and len(got) == 4 * (11 + 14 + 1) + 6
        for key in expected:
            assert got[key] == pytest.approx(expected[key], abs=1e-7), key
        assert len(brief) == 16
        assert brief["MR-short-mAP"] == got["short/MR-mAP/average"]
        assert brief["MR-full-R1@0.7"] == got["full/MR-R1/0.7"]
        assert brief["HL-min-VeryGood-Hit1"] == got["HL-min-VeryGood/HL-Hit1"]


def test_windows_are_grouped_by_their_length():
    """10 s is short, 30 s middle, 150 s long; what is longer or empty is only in the full group."""
    targets = [[[0, 10]], [[0, 30]], [[0, 150]], [[0, 160]], [[7, 7]]]
    predicted = [[[*windows[0], 1.0]] for windows in targets]
    report = metrics.moment_report(*moment_columns(predicted, targets))
    scores = {name: report[name]["MR-R1"]["0.95"] for name in report}
    # An empty window has no IoU with itself in R1.
    assert scores == {"short": 100, "middle": 100, "long": 100, "full": 80}
    one = metrics.moment_report(*moment_columns(predicted[:1], targets[:1]))
    assert one["long"]["MR-mAP"]["average"] == one["long"]["MR-R1"]["0.5"] == 0


def test_the_first_window_counts_for_r1_and_the_best_score_for_map():
    predicted, targets = [[[50, 60, 0.1], [0, 10, 0.9]]], [[[0, 10]]]
    report = metrics.moment_report(*moment_columns(predicted, targets))
    assert report["full"]["MR-R1"]["0.5"] == 0
    assert report["full"]["MR-mAP"]["average"] == pytest.approx(100)


def test_a_query_without_prediction_scores_zero():
    columns = moment_columns([[], [[0, 10, 1.0]]], [[[0, 10]], [[0, 10]]])
    report = metrics.moment_report(*columns)
    assert report["full"]["MR-R1"]["0.5"] == report["full"]["MR-mAP"]["0.5"] == pytest.approx(50)
    nothing = metrics.moment_report(*moment_columns([[], []], [[[0, 10]], [[0, 10]]]))
    assert nothing["full"]["MR-mIoU"] == nothing["full"]["MR-mAP"]["average"] == 0


def test_only_one_part_of_a_submission():
    submission, labels = qvhighlights(0, 5)
    whole = submissions.score_qvhighlights(submission, labels)
    moments = [{k: r[k] for k in ("qid", "pred_relevant_windows")} for r in submission]
    windows = [{k: r[k] for k in ("qid", "relevant_windows")} for r in labels]  # Charades-STA
    got = submissions.score_qvhighlights(moments, windows)
    assert got["full"] == whole["full"] and "HL-min-Fair" not in got and len(got["brief"]) == 10
    highlights = [{k: r[k] for k in ("qid", "pred_saliency_scores")} for r in submission]
    got = submissions.score_qvhighlights(highlights, labels)
    assert got["HL-min-Good"] == whole["HL-min-Good"] and "full" not in got


def test_bad_arguments_are_named():
    windows, scores, query, targets, target_query = moment_columns([[[0, 1, 1.0]]], [[[0, 1]]])
    with pytest.raises(ValueError, match="query 0 has none"):
        temporal.average_precisions(windows, scores, query, targets, target_query + 1)
    with pytest.raises(ValueError, match="query: 1 has no label"):
        temporal.first_window_ious(windows, query + 1, targets, target_query)
    with pytest.raises(ValueError, match="scores"):
        temporal.average_precisions(windows, [np.nan], query, targets, target_query)
