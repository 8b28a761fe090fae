"""Calls and events, and how each task is scored; J, F and AUC themselves are tested elsewhere."""

import dataclasses
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tpo_jax.data.formats import qvhighlights
from tpo_jax.data.formats.reading import Context
from tpo_jax.data.records import Example, Turn
from tpo_jax.evaluation import benchmarks, submissions
from tpo_jax.generation.rles import Rles

TIMES = np.arange(8) * 1.0


def example(task, answers, targets, start=0.0, end=8.0):
    turns = tuple(Turn("Where?", answer) for answer in answers)
    return Example("e", "v", "video", task, "test", start, end, turns, targets)


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def square(first, last, size=16):
    mask = np.zeros((size, size), bool)
    mask[first:last, first:last] = True
    return mask


def test_calls_count_markers_over_turns():
    two = example("region", ["At <region>.", "<region> then <temporal> and <region>"], {})
    calls = benchmarks.find_calls(two, 1)
    assert [(c.head, c.place, c.occurrence) for c in calls] == [
        ("region", 0, 1), ("temporal", 1, 0), ("region", 2, 2),
    ]  # fmt: skip
    assert [c.item for c in calls] == ["e/1/0", "e/1/1", "e/1/2"]


def test_a_missing_or_wrong_event_leaves_nothing_to_score():
    calls = benchmarks.find_calls(example("region", ["<region> and <region>"], {}), 0)
    assert benchmarks.match_events(calls, [("region", 1), ("region", 2)]) == [1, 2]
    assert benchmarks.match_events(calls, [("mask", 1), ("region", 2)]) == [None, 2]
    assert benchmarks.match_events(calls, [("region", 1)]) == [1, None]
    assert benchmarks.match_events(calls, []) == [None, None]
    counts = benchmarks.routing_counts([(calls, [("mask", None)]), (calls, [("region", None)] * 3)])
    assert counts == {"region": {"correct": 2, "missing": 1, "wrong": 1}}


@pytest.mark.parametrize(
    "task, answer, targets",
    [
        ("region", "<region>", {"boxes": [[0, 0, 0.5, 0.5]], "times": [0.0]}),
        ("temporal", "<temporal>", {"windows": [[0, 2]], "saliency": [1.0, 0, 0, 0],
                                    "saliency_interval": 2.0}),
        ("mask", "<mask>", {"times": [0.0], "rles": [None]}),
        ("tracking", "<mask>", {"times": [0.0, 1.0], "boxes": [[0, 0, 1, 1]] * 2}),
    ],
)  # fmt: skip
def test_a_head_that_is_not_called_scores_zero_in_every_metric(task, answer, targets):
    call = benchmarks.find_calls(example(task, [answer], targets), 0)[0]
    scores = benchmarks.score_call(call, None, TIMES)
    expected = set(benchmarks.TASK_METRICS[task])
    expected |= set(benchmarks.TASK_METRICS["highlight"]) if task == "temporal" else set()
    assert set(scores) == expected
    assert not any(scores.values())


def test_region_takes_the_target_of_its_own_marker():
    boxes = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    calls = benchmarks.find_calls(
        example("region", ["<region> <region>"], {"boxes": boxes, "times": [0, 0]}), 0
    )
    assert benchmarks.score_call(calls[1], {"box": boxes[1]}, TIMES)["region/acc@0.5"] == 1
    assert benchmarks.score_call(calls[1], {"box": boxes[0]}, TIMES)["region/acc@0.5"] == 0


def test_windows_by_hand():
    prediction = {"windows": [[0, 4, 0.9], [4, 8, 0.2]], "times": TIMES, "saliency": TIMES}
    scores = benchmarks.score_windows([[0, 6]], prediction)
    assert scores["temporal/miou"] == pytest.approx(4 / 6)
    assert (scores["temporal/r1@0.3"], scores["temporal/r1@0.5"], scores["temporal/r1@0.7"]) == (
        1, 1, 0,
    )  # fmt: skip
    assert scores["temporal/map"] == pytest.approx(4 / 10)  # found up to IoU 0.65
    assert not any(benchmarks.score_windows([[0, 6]], {"windows": []}).values())


def test_saliency_with_three_raters():
    targets = {
        "windows": [[2, 6]], "saliency": [0, 1, 0.75, 0], "saliency_interval": 2.0,
        "relevant_clip_ids": [1, 2], "saliency_scores": [[4, 4, 4], [4, 3, 2]],
    }  # fmt: skip
    asked = example("temporal", ["<temporal>"], targets)
    positive, first, interval = benchmarks.positive_clips(asked)
    assert (first, interval) == (0, 2.0)
    np.testing.assert_array_equal(positive, [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    curve = np.array([0, 0, 0.2, 0.2, 0.9, 0.9, 0, 0])  # the third clip comes first
    scores = benchmarks.score_saliency(asked, {"times": TIMES, "saliency": curve})
    assert scores["highlight/hit@1"] == 1  # one rater is enough
    assert scores["highlight/map"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


@pytest.mark.parametrize(("duration", "clips"), [(150, 75), (149, 74), (61, 30)])
def test_as_many_clips_are_scored_as_of_a_submission(duration, clips, tmp_path):
    """Which the benchmark's own program counts, too: int(duration / 2)."""
    label = {
        "qid": 1, "query": "q", "vid": "v", "duration": duration, "relevant_windows": [[0, 6]],
        "relevant_clip_ids": [0, 2], "saliency_scores": [[4, 3, 1], [4, 4, 4]],
    }  # fmt: skip
    file = tmp_path / "highlight.jsonl"
    file.write_text(json.dumps(label))
    (draft,), problems = qvhighlights.FORMAT.read(Context(file, "test"))
    asked = dataclasses.replace(draft.example, end=float(duration))  # as `prepare` knows it
    positive, first, _ = benchmarks.positive_clips(asked)
    submitted = {"qid": 1, "pred_saliency_scores": [0.0] * clips}
    _, _, counted, ratings = submissions.highlight_arrays([(submitted, label)])
    assert problems == [] and first == 0 and len(positive) == clips == counted[0]
    np.testing.assert_array_equal(positive, ratings[0] >= benchmarks.VERY_GOOD)


def test_one_saliency_is_read_on_the_five_point_scale_and_cut_to_the_clip():
    targets = {"saliency": [1.0, 0.85, 0.9, 0.0], "saliency_interval": 2.0}
    positive, first, _ = benchmarks.positive_clips(
        example("temporal", ["<temporal>"], targets, start=2.0, end=6.0)
    )
    assert first == 1
    np.testing.assert_array_equal(positive, [[False], [True]])


def test_masks_at_other_times_and_sizes():
    big, small = square(4, 12), square(2, 6, size=8)
    targets = {"times": [0.0, 2.0, 4.0], "rles": [rle(big), None, rle(big)]}
    exact = {"times": [0.1, 2.1, 3.9], "masks": np.stack([small, np.zeros_like(small), small])}
    assert benchmarks.score_masks(targets, exact) == {"mask/j": 1, "mask/f": 1, "mask/j&f": 1}
    always = {**exact, "masks": np.stack([small] * 3)}
    assert benchmarks.score_masks(targets, always)["mask/j"] == pytest.approx(2 / 3)
    nowhere = {"times": [0.0, 2.0], "rles": [None, None]}
    empty = {"times": [0.0, 2.0], "masks": np.zeros((2, 8, 8), bool)}
    assert benchmarks.score_masks(nowhere, empty)["mask/j"] == 1
    full = {"times": [0.0, 2.0], "masks": np.ones((2, 8, 8), bool)}
    assert benchmarks.score_masks(nowhere, full)["mask/j"] == 0


def test_frames_without_a_label_near_are_not_matched():
    frames, labels = benchmarks.match_times([0.0, 0.5, 1.0, 1.5, 9.0], [0.0, 1.0])
    np.testing.assert_array_equal(frames, [0, 1, 2, 3])
    np.testing.assert_array_equal(labels, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="no frame of"):
        benchmarks.match_times([50.0], [0.0, 1.0])


def test_a_label_counts_once_where_benchmarks_count():
    """Labels at 0, 1 and 2 s; frames in between are near one, but not its nearest."""
    times = [0.0, 0.4, 0.6, 0.9, 1.25, 9.0]
    for once, found in ((False, [0, 1, 2, 3, 4]), (True, [0, 3])):
        frames, labels = benchmarks.match_times(times, [0.0, 1.0, 2.0], once=once)
        assert frames.tolist() == found
        assert labels.tolist() == [round(times[frame]) for frame in found]
    # Fewer frames than labels: every frame has a label of its own either way.
    for once in (False, True):
        frames, labels = benchmarks.match_times([0.1, 2.0], np.arange(25) / 10, once=once)
        assert (frames.tolist(), labels.tolist()) == ([0, 1], [1, 20])
    targets = {"times": [0.0, 1.0, 2.0], "rles": [rle(square(4, 12)), None, None]}
    held = {"times": times, "masks": np.stack([square(4, 12)] * 2 + [square(0, 0)] * 4)}
    assert benchmarks.score_masks(targets, held, once=True)["mask/j"] == 1
    assert benchmarks.score_masks(targets, held)["mask/j"] == 1
    held["masks"][1] = False
    assert benchmarks.score_masks(targets, held, once=True)["mask/j"] == 1
    assert benchmarks.score_masks(targets, held)["mask/j"] == 4 / 5


def test_long_tracks_are_scored_piece_by_piece(monkeypatch):
    rng = np.random.default_rng(0)
    masks = rng.random((7, 9, 9)) < 0.5
    targets = {"times": TIMES[:7].tolist(), "rles": [rle(square(2, 6, 9))] * 3 + [None] * 4}
    whole = benchmarks.score_masks(targets, {"times": TIMES[:7], "masks": masks})
    monkeypatch.setattr(benchmarks, "PIECE", 2)
    read = Rles.of(masks)
    assert benchmarks.score_masks(targets, {"times": TIMES[:7], "masks": read}) == whole


def test_annotated_frames_are_those_of_the_part_that_is_asked_about():
    asked = example("mask", ["<mask>"], {"times": TIMES.tolist(), "rles": [None] * 8}, 2.0, 5.0)
    (call,) = benchmarks.find_calls(asked, 0)
    assert benchmarks.annotated_frames(call, [2.0, 4.0], once=True) == (4, 2)
    assert benchmarks.annotated_frames(call, [2.0, 2.2, 3.0, 4.0, 5.0], once=True) == (4, 4)
    assert benchmarks.annotated_frames(call, [2.0, 2.2], once=False) == (4, 1)
    assert benchmarks.annotated_frames(call, [50.0, 51.0], once=True) == (4, 0)


def test_a_track_that_shows_nothing_to_track_is_left_out():
    targets = {"times": TIMES.tolist(), "boxes": [[0, 0, 1, 1]] + [None] * 7}
    assert benchmarks.score_track(targets, None, TIMES) == {}
    targets["boxes"][3] = [0, 0, 1, 1]
    scores = benchmarks.score_track(targets, None, TIMES)
    assert set(scores) == set(benchmarks.TASK_METRICS["tracking"]) and not any(scores.values())
    held = {"times": TIMES, "boxes": [[0, 0, 1, 1]] * 8}
    assert benchmarks.score_track(targets, held, TIMES)["tracking/auc"] == pytest.approx(20 / 21)
