"""Metrics against published packages: trackeval, got10k and pycocoevalcap, to 1e-6."""

import copy
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco

from tpo_jax.evaluation.metrics import captions, mask, tracking

pytestmark = pytest.mark.parity


def tracks(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """bool[2, frames, h, w]: a label and a prediction that move; some frames are empty or noisy."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    out = np.zeros((2, frames, height, width), bool)
    centre, radius = rng.random((2, 2)) * [height, width], rng.random(2) * [height, width] / 3 + 1
    for frame in range(frames):
        centre = centre + rng.normal(0, 1.5, (1, 2))
        for side in range(2):
            cy, cx = centre[0] + side * rng.normal(0, 2, 2)
            out[side, frame] = ((y - cy) / radius[0]) ** 2 + ((x - cx) / radius[1]) ** 2 < 1
            if rng.random() < 0.2:
                out[side, frame] ^= rng.random((height, width)) < 0.1
            if rng.random() < 0.2:
                out[side, frame] = False
    return out


def as_trackeval(masks: np.ndarray) -> list:
    return [[coco.encode(np.asfortranarray(frame.astype(np.uint8)))] for frame in masks]


@pytest.mark.parametrize("size", [(1, 40, 50), (6, 64, 64), (4, 120, 213), (9, 3, 200)])
def test_j_and_f_equal_trackeval(size):
    from trackeval.metrics import JAndF

    for seed in range(4):
        target, predicted = tracks(seed, *size)
        if seed == 3:
            predicted[:] = False
        ids = [np.array([0])] * size[0]
        expected = JAndF().eval_sequence(
            {
                "num_timesteps": size[0],
                "num_gt_ids": 1,
                "num_tracker_ids": 1,
                "gt_ids": ids,
                "tracker_ids": ids,
                "gt_dets": as_trackeval(target),
                "tracker_dets": as_trackeval(predicted),
            }
        )
        j = mask.region_similarity(predicted, target).mean()
        f = mask.boundary_accuracy(predicted, target).mean()
        assert j == pytest.approx(expected["J-Mean"], abs=1e-6)
        assert f == pytest.approx(expected["F-Mean"], abs=1e-6)
        assert (j + f) / 2 == pytest.approx(expected["J&F"], abs=1e-6)


@pytest.mark.parametrize("bound", [None, (320, 240)])
def test_overlaps_equal_the_got10k_toolkit(bound):
    from got10k.experiments import ExperimentGOT10k
    from got10k.utils.metrics import rect_iou

    rng = np.random.default_rng(0)
    pooled, theirs = [], []
    for frames in (2, 50, 300):
        target = rng.random((frames, 4)) * [300, 220, 90, 90] - [20, 20, 0, 0]
        predicted = target + rng.normal(0, 12, target.shape)
        predicted[::5], predicted[1::9] = target[::5], 0.0
        target[2::11, 2:] = predicted[2::11, 2:] = 0.0
        visible = rng.integers(0, 3, frames)
        visible[-1] = 1
        pooled.append(tracking.got10k_ious(predicted, target, visible, bound))
        ious = rect_iou(predicted[1:].copy(), target[1:].copy(), bound=bound)[visible[1:] > 0]
        np.testing.assert_allclose(pooled[-1], ious, atol=1e-6)
        theirs.append(ious)
    average, rate, _, curve = ExperimentGOT10k._evaluate(None, np.concatenate(theirs), [])
    pooled = np.concatenate(pooled)
    assert tracking.average_overlap(pooled) == pytest.approx(average, abs=1e-6)
    assert tracking.success_rate(pooled) == pytest.approx(rate, abs=1e-6)
    assert tracking.success_rate(pooled, 0.75) == pytest.approx(curve[75], abs=1e-6)
    assert tracking.success_auc(pooled) == pytest.approx(curve[::5].mean(), abs=1e-6)


def random_captions(seed: int, items: int) -> tuple[list[str], list[list[str]]]:
    """Captions of 0 to 12 common words; every third candidate is one of its references."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, 31)

    def caption() -> str:
        words = rng.choice(30, int(rng.integers(0, 13)), p=chance / chance.sum())
        return " ".join(f"w{word}" for word in words)

    references = [[caption() for _ in range(rng.integers(1, 6))] for _ in range(items)]
    candidates = [r[0] if i % 3 == 0 else caption() for i, r in enumerate(references)]
    references[-1][0] = "w0 w0 w0 w1"
    return candidates, references


@pytest.mark.parametrize("items", [1, 2, 40])
def test_bleu_and_cider_equal_pycocoevalcap(items):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    for seed in range(5):
        candidates, references = random_captions(seed, items)
        given = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
        corpus = captions.read_corpus(candidates, references)
        whole, of_items = captions.bleu(corpus)
        expected, expected_of_items = Bleu(4).compute_score(*copy.deepcopy(given), verbose=0)
        np.testing.assert_allclose(whole, expected, atol=1e-6)
        np.testing.assert_allclose(of_items.T, expected_of_items, atol=1e-6)
        whole, of_items = captions.cider(corpus)
        expected, expected_of_items = Cider().compute_score(*given)
        assert whole == pytest.approx(expected, abs=1e-6)
        np.testing.assert_allclose(of_items, expected_of_items, atol=1e-6)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR is a Java program")
def test_meteor_equals_pycocoevalcap():
    """The score is not symmetric: candidates are shorter than their references."""
    from pycocoevalcap.meteor.meteor import Meteor

    candidates = ["a cat is on the mat", "nothing at all", "a man is running", "the dog runs"]
    references = [
        ["a cat sits on the mat", "the cat is on a mat by the old door"], ["a man is running"],
        ["a man is running"], ["two dogs are running in a large green field", "a dog runs home"],
    ]  # fmt: skip
    given = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    expected, expected_of_items = Meteor().compute_score(*given)
    whole, of_items = captions.meteor(candidates, references)
    assert whole == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(of_items, expected_of_items, atol=1e-6)
    assert of_items[2] == pytest.approx(1, abs=1e-6) and of_items[1] < 0.2 < of_items[0]
