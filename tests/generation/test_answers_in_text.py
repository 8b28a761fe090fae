"""Answers in words, read back."""

import numpy as np
import pytest

from tpo_jax.generation.task_text import read_results
from tpo_jax.models.heads import ClipInfo

TIMES = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 0.0])
CLIP = ClipInfo(0.0, 5.0, TIMES, np.arange(6) < 5, height=10, width=20)


def read(text, *tasks):
    return read_results(text, tasks, CLIP)


def test_a_box():
    (found,) = read("It is at [10,20,30,40].", "region")
    assert found == {"box": [0.1, 0.2, 0.3, 0.4], "box_pixels": pytest.approx([2.0, 2.0, 6.0, 4.0])}


def test_numbers_that_do_not_fit_are_cut_and_ordered():
    (found,) = read("[300, 20,30,4]", "region")
    assert found["box"] == [0.3, 0.04, 1.0, 0.2]
    (found,) = read("9.5 s to 2 s", "temporal")
    assert found["windows"] == [[2.0, 5.0, 1.0]]


def test_windows_and_their_saliency():
    (found,) = read("It happens at 0.5 s to 1.5 s and 3.0 s to 4.0 s.", "temporal")
    assert found["windows"] == [[0.5, 1.5, 1.0], [3.0, 4.0, 0.5]]
    assert found["times"] == [0, 1, 2, 3, 4]
    assert found["saliency"] == [0, 1, 0, 0.25, 0.25]


def test_a_mask_moves_between_its_boxes_and_ends_where_it_is_absent():
    said = "0.0 s [0,0,50,50], 2.0 s [20,0,70,100], 4.0 s absent"
    (found,) = read(f"It is {said}.", "mask")
    expected = [[0, 0, 0.5, 0.5], [0.1, 0, 0.6, 0.75], [0.2, 0, 0.7, 1], None, None]
    for box, wanted in zip(found["boxes"], expected, strict=True):
        assert box == (wanted and pytest.approx(wanted))
    assert found["presence"] == [1, 1, 1, 0, 0]
    assert found["masks"].shape == (5, 10, 20)
    assert found["masks"][1].sum() == 10 * round(0.75 * 10 + 1e-9) and not found["masks"][3:].any()
    assert found["masks"][2, :, 4:14].all() and found["masks"][2].sum() == 100


def test_results_come_in_order_until_one_is_not_there():
    first, second = read("[0,0,10,10] at 1.0 s to 2.0 s", "region", "temporal")
    assert first["box"][2] == 0.1 and second["windows"] == [[1.0, 2.0, 1.0]]
    assert len(read("1.0 s to 2.0 s, then nothing", "temporal", "region", "temporal")) == 1
    assert read("It happens at <temporal>.", "temporal") == []
    assert read("It is [1,2,3].", "region") == []
