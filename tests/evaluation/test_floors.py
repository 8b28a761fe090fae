"""Floors are chosen on the training split, scored on the test split, and find what is constant."""

import dataclasses

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tpo_jax.data.records import Example, PreparedDataset, Turn, VideoInfo
from tpo_jax.evaluation import floors
from tpo_jax.evaluation.floors import Candidate

TIMES = (np.arange(8) + 0.5).astype(np.float32)


class MemoryDataset:
    """Videos of 8 seconds, one frame a second; frames are not needed."""

    def __init__(self, examples):
        self._examples = examples
        self.videos = sorted({example.video_id for example in examples})

    def video_info(self, video_id):
        return VideoInfo("video", 8.0, 8, TIMES, 32, 32)

    def examples(self, video_id):
        return [example for example in self._examples if example.video_id == video_id]


def example(number, task, answer, targets, options=(), kind=""):
    turn = Turn("?", answer, tuple(options), kind)
    return Example(f"{task}{number}", f"v{number}", "video", task, "t", 0.0, 8.0, (turn,), targets)


def temporal(number, window, best_clip):
    saliency = [float(clip == best_clip) for clip in range(4)]
    targets = {"windows": [window], "saliency": saliency, "saliency_interval": 2.0}
    return example(number, "temporal", "<temporal>", targets)


def mask_rle(box):
    mask = np.zeros((32, 32), np.uint8)
    x1, y1, x2, y2 = (int(32 * v) for v in box)
    mask[y1:y2, x1:x2] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [32, 32], "counts": encoded["counts"].decode()}


def tracks(number, boxes):
    times = TIMES.tolist()
    rles = [None if box is None else mask_rle(box) for box in boxes]
    still = {"times": times, "boxes": boxes, "input_box": boxes[0]}
    return [
        example(number, "mask", "<mask>", {"times": times, "rles": rles}),
        example(number, "tracking", "<mask>", still),
    ]


def values(found):
    return {metric: {c.name: c.test for c in candidates} for metric, candidates in found.items()}


def test_the_window_and_the_clip_come_from_training():
    train = MemoryDataset([temporal(i, [2.0, 4.0], 3) for i in range(4)])
    same = floors.constant_floors(train, MemoryDataset([temporal(9, [2.0, 4.0], 3)]), 8)
    other = floors.constant_floors(train, MemoryDataset([temporal(9, [6.0, 8.0], 0)]), 8)
    best = "constant window 0.25-0.50 of the clip"
    assert values(same)["temporal/miou"] == {best: 1.0}
    assert values(same)["highlight/hit@1"] == {"clip number 3": 1.0}
    # Another test split changes what the constants score, not which constants they are.
    assert {m: set(v) for m, v in values(same).items()} == {
        m: set(v) for m, v in values(other).items()
    }
    assert values(other)["temporal/miou"] == {best: 0.0}
    assert values(other)["highlight/hit@1"] == {"clip number 3": 0.0}


def test_boxes_and_masks_come_from_training():
    box = [0.25, 0.25, 0.5, 0.75]
    train = MemoryDataset(
        [e for i in range(3) for e in tracks(i, [box] * 8)]
        + [example(8, "region", "<region>", {"boxes": [box], "times": [1.0]})]
    )
    test = MemoryDataset(
        tracks(4, [box] * 4 + [[0.25, 0.5, 0.5, 1.0]] * 4)
        + [example(9, "region", "<region>", {"boxes": [box], "times": [1.0]})]
    )
    found = values(floors.constant_floors(train, test, 8))
    name = "constant box (0.25, 0.25, 0.50, 0.75)"
    assert found["region/acc@0.5"] == {name: 1.0}
    assert list(found["mask/j"].values())[0] == pytest.approx((4 + 4 / 3) / 8)
    # Three frames after the given one are right (20/21), four overlap by 1/3 (seven of them).
    assert found["tracking/auc"]["input box held still"] == pytest.approx(
        (3 * 20 + 4 * 7) / (7 * 21), abs=1e-6
    )
    assert set(found["tracking/auc"]) == {name, "input box held still"}
    assert found["tracking/sr@0.5"]["input box held still"] == 3 / 7


def test_tracks_with_masks_have_floors_of_their_masks():
    """A filled box that stays; only what both splits can say is known of the training split."""
    box = [0.25, 0.25, 0.5, 0.75]
    later = [0.25, 0.5, 0.5, 1.0]
    (_, still), (_, moves) = tracks(0, [box] * 8), tracks(1, [box] * 4 + [later] * 4)
    rles = [mask_rle(b) for b in moves.targets["boxes"]]
    moves = dataclasses.replace(moves, targets={**moves.targets, "rles": rles})
    found = floors.constant_floors(MemoryDataset([still]), MemoryDataset([moves]), 8)
    (held,) = (c for c in found["tracking/j"] if c.name == "input box held still")
    # Neither the first frame nor the last: three are right, three overlap by 1/3.
    assert held.test == pytest.approx((3 + 3 / 3) / 6) and np.isnan(held.train)
    assert {c.train for c in found["tracking/auc"]} == {20 / 21}


def test_no_mask_at_all_is_a_candidate():
    box = [0.0, 0.0, 0.25, 0.25]
    absent = MemoryDataset([e for i in range(3) for e in tracks(i, [box, box] + [None] * 6)])
    found = values(floors.constant_floors(absent, absent, 8))
    assert found["mask/j"] == {"empty mask": 6 / 8}


def test_answers_that_are_frequent_in_training():
    def asked(number, answer, kind="colour"):
        return example(number, "conversation", answer, {}, ("red", "blue", "green"), kind)

    train = MemoryDataset([asked(0, "red"), asked(1, "red"), asked(2, "blue")])
    test = MemoryDataset([asked(3, "red"), asked(4, "blue"), asked(5, "green", "new kind")])
    found = floors.best(floors.constant_floors(train, test, 8))
    assert found["qa/accuracy/colour"] == 0.5
    assert found["qa/accuracy/new kind"] == pytest.approx(1 / 3)  # nothing known: chance
    assert found["qa/accuracy"] == pytest.approx((1 + 0 + 1 / 3) / 3)


def test_trained_models_join_and_the_best_wins():
    constants = {"qa/accuracy": [Candidate("most frequent", 0.3, 0.3)]}
    joined = floors.with_trained_models(
        constants,
        {
            "text-only model": {"qa/accuracy": 0.35, "qa/accuracy/order": 0.4},
            "middle-frame model": {"qa/accuracy": 0.45, "temporal/miou": 0.9},
        },
    )
    assert floors.best(joined) == {"qa/accuracy": 0.45, "qa/accuracy/order": 0.4}
    assert len(constants["qa/accuracy"]) == 1


def test_rendered_videos_give_low_floors(prepared):
    train, test = (PreparedDataset(prepared / split) for split in ("train", "test"))
    found = floors.best(floors.constant_floors(train, test, 32))
    expected = {"qa/accuracy", "temporal/r1@0.5", "temporal/miou", "highlight/hit@1",
                "region/acc@0.5", "mask/j", "mask/f", "tracking/auc"}  # fmt: skip
    assert expected <= set(found)
    assert all(0 <= value <= 1 for value in found.values())
    assert found["mask/j"] < 0.4 and found["region/acc@0.5"] < 0.4
