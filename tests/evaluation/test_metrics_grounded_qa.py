"""NExT-GQA against its definition, and by hand."""

import numpy as np
import pytest
from metric_inputs import grounded_qa as grounded_qa_input

from experiments.benchmarks import metric_oracles
from tpo_jax.evaluation.metrics import grounded_qa as metrics


@pytest.mark.parametrize("grid", [0.0, 8.0])
@pytest.mark.parametrize("questions", [1, 60])
def test_equals_the_definition(grid, questions):
    for seed in range(5):
        spans, windows, correct = grounded_qa_input(seed, questions, grid)
        expected = metric_oracles.grounded_qa_table(spans, windows, correct)
        iop, iou = metrics.overlaps(
            list(spans.values()),
            [window for rows in windows.values() for window in rows],
            np.repeat(np.arange(questions), [len(rows) for rows in windows.values()]),
        )
        got = metrics.report(iop, iou, list(correct.values()))
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key] == pytest.approx(expected[key], abs=1e-9), key


def test_by_hand():
    spans = [[0, 10], [4, 4], [0, 2], [8, 3], [9, 9]]
    windows = [[5, 20], [8, 10], [0, 5], [5, 6], [0, 10], [0, 1]]
    iop, iou = metrics.overlaps(spans, windows, [0, 0, 1, 2, 3, 4])
    # A point inside its window, a miss, a span that ends before it starts, a point outside.
    np.testing.assert_allclose(iop, [5 / 10, 1, 0, 0, 0])
    np.testing.assert_allclose(iou, [5 / 20, 0, 0, 0, 0])
    found = metrics.report(iop, iou, [True, False, True, True, True])
    assert found["Acc@QA"] == pytest.approx(80) and found["Acc@GQA"] == pytest.approx(20)


def test_a_question_without_window_and_bad_arguments():
    iop, iou = metrics.overlaps([[0, 1]], np.zeros((0, 2)), [])
    assert iop == iou == [0]
    with pytest.raises(ValueError, match="window_question"):
        metrics.overlaps([[0, 1]], [[0, 1]], [1])
    with pytest.raises(ValueError, match=r"spans\[0\]"):
        metrics.overlaps([[0, np.nan]], [[0, 1]], [0])
