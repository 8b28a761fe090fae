"""Files in published formats through `python -m tpo_jax.evaluate`, and what is refused."""

import json

import pytest
from metric_inputs import detection, grounded_qa, nextgqa_files, qvhighlights

from experiments.benchmarks import metric_oracles
from tpo_jax import evaluate
from tpo_jax.evaluation import submissions
from tpo_jax.evaluation.metrics.detection import PROTOCOLS, THUMOS14_EXTRA_VIDEOS


def write(path, content):
    """Writes JSON, or JSON lines to a name that says so."""
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(folder, benchmark, predictions, annotations, *more):
    arguments = [f"--predictions={predictions}", f"--annotations={annotations}", *more]
    return evaluate.main([*arguments, f"--benchmark={benchmark}", f"--out={folder / 'out.json'}"])


def test_qvhighlights_files(tmp_path, capsys):
    submission, labels = qvhighlights(0, 8)
    files = write(tmp_path / "p.jsonl", submission), write(tmp_path / "a.jsonl", labels)
    assert run(tmp_path, "qvhighlights", *files) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    expected = metric_oracles.moment_table(submission, labels)["full"]["MR-R1"]["0.5"]
    assert report["brief"]["MR-full-R1@0.5"] == pytest.approx(expected)
    assert f"{'MR-full-R1@0.5':20}  {expected:6.2f}\n" in capsys.readouterr().out


def with_subset(database, subset):
    return {
        "database": {
            video: {"subset": subset, "annotations": rows} for video, rows in database.items()
        }
    }


def test_activitynet_files(tmp_path):
    results, database = detection(0, 9)
    labels = with_subset(database, "validation")
    labels["database"]["train"] = {"subset": "training", "annotations": [{"label": "other"}]}
    files = write(tmp_path / "p.json", {"results": results}), write(tmp_path / "a.json", labels)
    assert run(tmp_path, "activitynet", *files) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    table = metric_oracles.detection_table(results, database, PROTOCOLS["activitynet"].thresholds)
    mean = [100 * sum(column) / len(table) for column in zip(*table.values(), strict=True)]
    assert report["mAP@0.5"] == pytest.approx(mean[0])
    assert report["mAP@0.5:0.95"] == pytest.approx(sum(mean) / 10)


@pytest.fixture(scope="module")
def thumos14():
    """212 labelled videos, the two disputed ones among them; segments as text."""
    results, database = detection(2, 400)
    database = {video: rows for video, rows in database.items() if rows}
    names = dict(zip(database, THUMOS14_EXTRA_VIDEOS, strict=False))
    names |= {video: video for video in list(database)[2:212]}
    database = {names[video]: database[video] for video in names}
    results = {names.get(video, video): rows for video, rows in results.items()}
    as_text = {
        video: [row | {"segment": [str(value) for value in row["segment"]]} for row in rows]
        for video, rows in database.items()
    }
    return results, database, with_subset(as_text, "test")


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("thumos14")])
def test_thumos14_protocols(thumos14, name):
    results, database, labels = thumos14
    if "210" in name:
        database = {v: rows for v, rows in database.items() if v not in THUMOS14_EXTRA_VIDEOS}
    if "rounded" in name:
        factor = 25 / 16
        results, database = (
            {
                video: [row | {"segment": [convert(v) for v in row["segment"]]} for row in rows]
                for video, rows in table.items()
            }
            for table, convert in (
                (results, lambda v: v * factor),
                (database, lambda v: round(v * factor)),
            )
        )
    found = submissions.score_detection({"results": thumos14[0]}, labels, name)
    table = metric_oracles.detection_table(results, database, [0.5])
    assert found["mAP@0.5"] == pytest.approx(100 * sum(v[0] for v in table.values()) / len(table))
    assert list(found)[-3:] == ["mAP@0.1:0.5", "mAP@0.3:0.7", "mAP@0.1:0.7"]


def test_the_210_video_labels_do_not_pass_for_212(thumos14):
    results, _, labels = thumos14
    fewer = {v: e for v, e in labels["database"].items() if v not in THUMOS14_EXTRA_VIDEOS}
    with pytest.raises(ValueError, match="expects 212 labelled videos of subset 'test', found 210"):
        submissions.score_detection(
            {"results": results}, {"database": fewer}, "thumos14_212_seconds"
        )


def test_nextgqa_files(tmp_path):
    spans, windows, correct = grounded_qa(0, 20)
    labels, answers = nextgqa_files(windows, correct)
    del spans[next(iter(spans))]
    paths = [tmp_path / name for name in ("p.json", "a.json", "q.json")]
    files = [write(path, c) for path, c in zip(paths, (spans, labels, answers), strict=True)]
    assert run(tmp_path, "nextgqa", *files[:2], f"--answers={files[2]}") == 0
    report = json.loads((tmp_path / "out.json").read_text())
    expected = metric_oracles.grounded_qa_table(spans, windows, correct)
    assert report == pytest.approx(expected | {"questions": 19, "without prediction": 1})
    assert run(tmp_path, "nextgqa", *files[:2]) == 2


def changed(records, **change):
    """The records with the first one changed."""
    return [records[0] | change, *records[1:]]


def test_bad_qvhighlights_records_are_named():
    submission, labels = qvhighlights(0, 3)
    submission.sort(key=lambda record: record["qid"])
    score = submissions.score_qvhighlights
    for arguments, message in (
        ((changed(submission, qid=9), labels), "2 are in one file only, the first: 0, 9"),
        (([*submission, submission[0]], labels), "predictions: qid 0 has more than one record"),
        ((submission, changed(labels, relevant_windows=[])), "qid 0: relevant_windows is empty"),
        (
            (submission, changed(labels, relevant_clip_ids=[99], saliency_scores=[[1, 2, 3]])),
            "qid 0: relevant_clip_ids has 99, the video has",
        ),
        (
            (submission, changed(labels, relevant_clip_ids=[1], saliency_scores=[])),
            "qid 0: 0 saliency_scores for 1 relevant_clip_ids",
        ),
        (
            (changed(submission, pred_relevant_windows=[[0, 1]]), labels),
            r"pred_relevant_windows: expected 3 numbers, got \[0, 1\]",
        ),
        ((changed(submission, pred_saliency_scores=[]), labels), "qid 0: a saliency score"),
        (([{"qid": 0}], labels[:1]), "no record has pred_relevant_windows"),
        (([], labels), "predictions: the file has no record"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*arguments)


def test_bad_detection_records_are_named():
    rows = [{"label": "jump", "segment": [0, 1]}]
    labels = with_subset({"v": rows}, "validation")
    guess = {"label": "fly", "segment": [0, 1], "score": 1.0}
    with pytest.raises(ValueError, match=r"results\['v'\]: label 'fly' has no annotation"):
        submissions.score_detection({"results": {"v": [guess]}}, labels, "activitynet")
    several = {"u": [guess | {"label": "jump"}] * 2, "w": [guess | {"label": "jump"}, guess]}
    with pytest.raises(ValueError, match=r"results\['w'\]: label 'fly' has no annotation"):
        submissions.score_detection({"results": several}, labels, "activitynet")
    for change, message in (
        ({"segment": [0, 1, 2]}, r"segment: expected 2 numbers, got \[0, 1, 2\]"),
        ({"segment": [0, float("inf")]}, "segment: a number is not finite"),
        ({"score": float("nan")}, "scores: expected 1 finite numbers"),
    ):
        given = {"results": {"v": [guess | {"label": "jump"} | change]}}
        with pytest.raises(ValueError, match=message):
            submissions.score_detection(given, labels, "activitynet")
    with pytest.raises(ValueError, match="predictions: no field 'results'; found version"):
        submissions.score_detection({"version": 1}, labels, "activitynet")
    with pytest.raises(ValueError, match="some labelled videos of subset 'validation', found 0"):
        submissions.score_detection({"results": {}}, {"database": {}}, "activitynet")


def test_bad_grounded_qa_records_are_named():
    spans, windows = {"v_0": [0, 1], "v_1": [0, 2]}, {"0": [[0, 1]], "1": [[0, 1], [4, 5]]}
    labels, answers = {"v": {"location": windows}}, {"v_0": {"prediction": 1, "answer": 1}}
    for arguments, message in (
        ((spans, labels, answers), "answers: 'v_1' and 0 more have none"),
        (({"w_0": [0, 1]}, labels, answers), "no key <video>_<question> is in the annotations"),
        (({"v_0": [0]}, labels, answers), r"span: expected 2 numbers, got \[0\]"),
        (
            ({"v_0": [0, 1]}, {"v": {"location": {"0": [[0, 1], [2]]}}}, answers),
            r"location: expected 2 numbers, got \[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            submissions.score_nextgqa(*arguments)


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    broken = tmp_path / "p.json"
    broken.write_text("{")
    assert run(tmp_path, "activitynet", broken, broken) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "p.json: not JSON" in error and error.count("\n") == 1
    write(broken, {"results": {"v": [{"label": "jump"}]}})
    labels = with_subset({"v": [{"label": "jump", "segment": [0, 1]}]}, "validation")
    assert run(tmp_path, "activitynet", broken, write(tmp_path / "a.json", labels)) == 2
    assert "not in its format: KeyError('segment')" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.parse([f"--predictions={broken}", "--benchmark=activitynet"])
    assert "required: --annotations" in capsys.readouterr().err
