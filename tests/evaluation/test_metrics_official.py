"""What the official programs give on this suite's own inputs, stored in official_metrics.json.

Made once, outside of this repository, which has none of their code:
  qvhighlights: jayleicn/moment_detr@b7e553a, `standalone_eval.eval.eval_submission(submission,
    labels, verbose=False)` with `submission, labels = metric_inputs.qvhighlights(0, 40)`. Its
    numbers are formatted with 17 digits instead of two decimals, and a query without relevant
    clips, at which it stops, got one clip that all rate 0.
  activitynet: activitynet/ActivityNet@82304fa, `ANETdetection(GT, PREDICTIONS,
    check_status=False).evaluate()` of Evaluation/eval_detection.py, through Python's own lib2to3
    and with `numpy.float = float`, on files of `metric_inputs.detection(0, 12)`; `ap` by class and
    `mAP`.
  nextgqa: doc-doc/NExT-GQA@63772e0, `eval_ground(labels, spans, answers)` of
    code/TempGQA/eval_ground.py, with 17 digits instead of one decimal, on
    `spans, windows, correct = metric_inputs.grounded_qa(0, 60)` and
    `labels, answers = metric_inputs.nextgqa_files(windows, correct)`. It prints no Acc@QA.
  degenerate: the same calls on `metric_inputs.degenerate_qvhighlights(SEED, 40)`,
    `degenerate_detection(SEED, 8)` and `degenerate_grounded_qa(SEED, 60)`, seeds 0, 1 and 2: ties,
    thresholds met exactly, windows of no length, windows that end before they start, a class and
    questions without a prediction.
With NumPy 1.26.4 and NPY_DISABLE_CPU_FEATURES="AVX2 AVX512F AVX512CD AVX512_SKX AVX512_CLX
AVX512_CNL AVX512_ICL": its vector sorts put equal scores in another order, and `activitynet` of
`degenerate` is another then. The first three have no ties and are the same with them.
"""

import json
import pathlib

import numpy as np
import pytest
from metric_inputs import (
    degenerate_detection,
    degenerate_grounded_qa,
    degenerate_qvhighlights,
    detection,
    grounded_qa,
    leaves,
    nextgqa_files,
    qvhighlights,
)

from tpo_jax.evaluation import submissions
from tpo_jax.evaluation.metrics import detection as detection_metrics

OFFICIAL = json.loads(pathlib.Path(__file__).with_name("official_metrics.json").read_text())
LABELS = {"swim": 0, "run": 1, "jump": 2}


def check_qvhighlights(inputs, official):
    got = dict(leaves(submissions.score_qvhighlights(*inputs)))
    expected = dict(leaves(official))
    assert len(expected) == 4 * (11 + 10) + 6
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-6), key


def check_detection(inputs, official):
    results, database = inputs
    labels = {name: {"subset": "validation", "annotations": rows}
              for name, rows in database.items()}  # fmt: skip
    got = submissions.score_detection({"results": results}, {"database": labels}, "activitynet")
    thresholds = np.round(detection_metrics.ACTIVITYNET_THRESHOLDS, 2)
    for threshold, value in zip(thresholds, official["mAP"], strict=True):
        assert got[f"mAP@{threshold:g}"] == pytest.approx(100 * value, abs=1e-6), threshold
    assert got["mAP@0.5:0.95"] == pytest.approx(100 * official["average"], abs=1e-6)
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
        np.testing.assert_allclose(by_class[number], official["classes"][name], atol=1e-8)


def check_grounded_qa(inputs, official):
    spans, windows, correct = inputs
    got = submissions.score_nextgqa(spans, *nextgqa_files(windows, correct))
    assert len(official) == 7
    for key, value in official.items():
        assert got[key] == pytest.approx(value, abs=1e-6), key


def test_qvhighlights_equals_standalone_eval():
    check_qvhighlights(qvhighlights(0, 40), OFFICIAL["qvhighlights"])


def test_detection_equals_the_activitynet_evaluation():
    check_detection(detection(0, 12), OFFICIAL["activitynet"])


def test_grounded_qa_equals_eval_ground():
    check_grounded_qa(grounded_qa(0, 60), OFFICIAL["nextgqa"])


@pytest.mark.parametrize("seed", range(3))
def test_degenerate_inputs_equal_the_official_programs(seed):
    official = {name: values[seed] for name, values in OFFICIAL["degenerate"].items()}
    check_qvhighlights(degenerate_qvhighlights(seed, 40), official["qvhighlights"])
    check_detection(degenerate_detection(seed, 8), official["activitynet"])
    check_grounded_qa(degenerate_grounded_qa(seed, 60), official["nextgqa"])


def test_the_degenerate_inputs_are_so():
    """Else their numbers would say nothing of what they are there for."""
    submission, labels = degenerate_qvhighlights(0, 40)
    windows = np.array([w for row in submission for w in row["pred_relevant_windows"]])
    targets = np.array([w for row in labels for w in row["relevant_windows"]])
    results, database = degenerate_detection(1, 8)
    segments = np.array([row["segment"] for rows in results.values() for row in rows])
    labelled = np.array([row["segment"] for rows in database.values() for row in rows])
    spans, asked, _ = degenerate_grounded_qa(0, 60)
    for predicted in (windows, segments, np.array(list(spans.values()))):
        assert (predicted[:, 1] < predicted[:, 0]).any()
        assert (predicted[:, 1] == predicted[:, 0]).any()
    assert (targets[:, 1] == targets[:, 0]).any() and (labelled[:, 1] == labelled[:, 0]).any()
    assert any(len({w[2] for w in row["pred_relevant_windows"]}) < len(row["pred_relevant_windows"])
               for row in submission)  # fmt: skip
    assert not any(row["label"] == "run" for rows in results.values() for row in rows)
    assert any(row["label"] == "run" for rows in database.values() for row in rows)
    assert set(spans) < set(asked)
