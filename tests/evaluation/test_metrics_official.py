"""What the official programs give on this suite's own inputs, stored in official_metrics.json.

Made once, outside of this repository, which has none of their code:
  qvhighlights: jayleicn/moment_detr@b7e553a, `standalone_eval.eval.eval_submission(submission,
    labels, verbose=False)` with `submission, labels = metric_inputs.qvhighlights(0, 40)`. Its
    numbers are formatted with 17 digits instead of two decimals, and a query without relevant
    clips, at which it stops, got one clip that all rate 0.
  activitynet: activitynet/ActivityNet@82304fa, `ANETdetection(GT, PREDICTIONS,
    check_status=False).evaluate()` of Evaluation/eval_detection.py, through Python's own lib2to3,
    on files of `metric_inputs.detection(0, 12)`; `ap` by class and `mAP`.
The inputs have no ties, so that the order of a sort decides nothing.
"""

import json
import pathlib

import numpy as np
import pytest
from metric_inputs import detection, qvhighlights

from tpo_jax.evaluation import submissions
from tpo_jax.evaluation.metrics import detection as detection_metrics

OFFICIAL = json.loads(pathlib.Path(__file__).with_name("official_metrics.json").read_text())
LABELS = {"swim": 0, "run": 1, "jump": 2}


def numbers(table, prefix=""):
    for name, value in table.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def test_qvhighlights_equals_standalone_eval():
    got = dict(numbers(submissions.score_qvhighlights(*qvhighlights(0, 40))))
    expected = dict(numbers(OFFICIAL["qvhighlights"]))
    assert len(expected) == 4 * (11 + 10) + 6
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-6), key


def test_detection_equals_the_activitynet_evaluation():
    results, database = detection(0, 12)
    labels = {name: {"subset": "validation", "annotations": rows}
              for name, rows in database.items()}  # fmt: skip
    got = submissions.score_detection({"results": results}, {"database": labels}, "activitynet")
    thresholds = np.round(detection_metrics.ACTIVITYNET_THRESHOLDS, 2)
    expected = OFFICIAL["activitynet"]
    for threshold, value in zip(thresholds, expected["mAP"], strict=True):
        assert got[f"mAP@{threshold:g}"] == pytest.approx(100 * value, abs=1e-6), threshold
    assert got["mAP@0.5:0.95"] == pytest.approx(100 * expected["average"], abs=1e-6)
    videos = {name: number for number, name in enumerate([*database, *results])}

    def columns(rows_of):
        rows = [(name, row) for name, rows in rows_of.items() for row in rows]
        return ([row["segment"] for _, row in rows], [LABELS[row["label"]] for _, row in rows],
                [videos[name] for name, _ in rows])  # fmt: skip

    segments, classes, where = columns(results)
    scores = [row["score"] for rows in results.values() for row in rows]
    by_class = detection_metrics.average_precision(
        segments, scores, classes, where, *columns(database)
    )
    for name, number in LABELS.items():
        np.testing.assert_allclose(by_class[number], expected["classes"][name], atol=1e-8)
