"""Slot targets of every head."""

import numpy as np
import pytest
from fake_dataset import square_rle
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from tpo_jax.data import sampling
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.targets import TARGETS, TargetError, View, area_resize, slot_target
from tpo_jax.data.text import TASK_TOKENS

BUCKET = Bucket("b", "video", 1, frames=8, branches=1, branch_tokens=8, answers=4, windows=2,
                mask_size=16)
VIEW = View(0.0, 8.0, np.arange(8) + 0.5)


def test_every_head_has_targets():
    assert set(TARGETS) == set(TASK_TOKENS)


def test_blank_and_filled_arrays_have_the_same_form():
    examples = {
        "region": {"boxes": [[0, 0, 1, 1]], "times": [1.0]},
        "temporal": {"windows": [[1, 2]], "saliency": [0.5], "saliency_interval": 2.0},
        "mask": {"times": [1.0], "rles": [square_rle()]},
        "box": {"input_box": [0, 0, 1, 1]},
    }
    for head, targets in examples.items():
        TARGETS[head].check(targets, 1, VIEW, BUCKET)
        blank, filled = TARGETS[head].blank(BUCKET), TARGETS[head].fill(targets, 0, VIEW, BUCKET)
        assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
            k: (v.shape, v.dtype) for k, v in filled.items()}, head


def test_region_takes_the_box_of_its_marker_and_the_nearest_frame():
    targets = {"boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], "times": [0.2, 7.0]}
    fill = TARGETS["region"].fill(targets, 1, VIEW, BUCKET)
    assert fill["boxes"].tolist() == [0.5, 0.5, 1, 1]
    assert fill["frame"] == 6  # 6.5 and 7.5 are equally near: the earlier


@pytest.mark.parametrize("shown, clip, near, far", [
    (np.arange(8) + 0.5, (0, 8), [0, 8, 8.4], [8.6, 30]),  # a second apart
    (np.arange(8) * 4 + 2, (0, 32), [0, 31.9, 34], [34.1]),  # four seconds apart
    ([4.0, 4.5, 5.0], (4, 5.2), [3.6, 4.1, 5.2, 5.5], [0, 3.4, 5.6]),  # a part of the video
    (np.arange(1, 33) * 0.5, (0, 16.5), [0, 16.4], [17]),  # the sampler left the first of 33 out
    ([0, 0.5, 1, 1, 1, 1], (0, 1.5), [1.4], [1.6]),  # a short clip, its last frame repeated
    ([0, 0.5, 20, 20.5], (0, 21), [5.2, 6, 10, 25.7], [25.8]),  # a hole in the video
    (np.arange(16), (0, 17), [16.9, 17], [18.1]),  # the sampler left the last of 17 out
    (np.arange(16), (0, 19), [18.5, 19], [19.1]),  # and the last three of 19
    ([3.0], (0, 8), [0, 3, 8], [8.1]),  # one frame of a clip
    ([3.0], (3.1, 3.2), [3.1, 3.2], [3.5]),  # a clip between two frames
    ([0.0], (0, 0), [0.0], [0.5]),  # an image
])
def test_a_region_outside_of_the_clip_is_refused(shown, clip, near, far):
    view = View(*clip, np.asarray(shown, np.float64))
    for time in near:
        targets = {"boxes": [[0, 0, 1, 1]] * 2, "times": [view.times[0], time]}
        TARGETS["region"].check(targets, 2, view, BUCKET)
        frame = TARGETS["region"].fill(targets, 1, view, BUCKET)["frame"]
        assert abs(view.times[frame] - time) == np.abs(view.times - time).min()
    for time in far:
        targets = {"boxes": [[0, 0, 1, 1]] * 2, "times": [view.times[0], time]}
        with pytest.raises(TargetError, match=rf"times\[1\]: {time} s, but of the clip"):
            TARGETS["region"].check(targets, 2, view, BUCKET)
        with pytest.raises(TargetError, match="at most .* s before or behind these. Correct"):
            TARGETS["region"].fill(targets, 1, view, BUCKET)


@given(st.integers(1, 80), st.sampled_from(sorted(sampling.SAMPLERS)), st.integers(1, 40),
       st.sampled_from([0.25, 0.5, 1 / 8]), st.data())
def test_a_region_of_the_clip_is_never_refused(stored, method, count, step, data):
    """However frames are chosen of a video whose frames are evenly spaced."""
    times = np.arange(stored) * step
    first = data.draw(st.integers(0, stored - 1))
    last = data.draw(st.integers(first, stored - 1))
    start, end = times[first], times[last] + step
    inside = times[first : last + 1]
    view = View(start, end, inside[sampling.shown(method, inside, count, start, end)])
    time = data.draw(st.floats(start, end))
    TARGETS["region"].check({"boxes": [[0, 0, 1, 1]], "times": [time]}, 1, view, BUCKET)


@given(start=st.floats(0, 100), length=st.floats(0.5, 100),
       shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(
           lambda s: s[1] - s[0] > 0.01))
def test_windows_come_back_in_seconds(start, length, shares):
    window = [start + share * length for share in shares]
    view = View(start, start + length, np.linspace(start, start + length, 8))
    fill = TARGETS["temporal"].fill({"windows": [window]}, 0, view, BUCKET)
    assert fill["window_valid"].tolist() == [True, False]
    normalised = fill["windows"][0]
    assert (0 <= normalised).all() and (normalised <= 1).all()
    np.testing.assert_allclose(view.start + normalised * (view.end - view.start), window,
                               atol=1e-5 * (start + length))


def test_windows_are_cut_to_the_clip_and_others_left_out():
    view = View(2.0, 6.0, np.linspace(2, 6, 8))
    targets = {"windows": [[0.0, 1.0], [1.0, 4.0], [5.0, 9.0]]}
    fill = TARGETS["temporal"].fill(targets, 0, view, BUCKET)
    assert fill["windows"].tolist() == [[0.0, 0.5], [0.75, 1.0]]
    assert fill["window_valid"].all()


def test_saliency_is_that_of_the_clip_under_each_frame():
    targets = {"windows": [[0, 8]], "saliency": [0.0, 1.0, 0.25], "saliency_interval": 2.0}
    fill = TARGETS["temporal"].fill(targets, 0, VIEW, BUCKET)
    assert fill["saliency"].tolist() == [0, 0, 1, 1, 0.25, 0.25, -1, -1]
    fewer = View(0.0, 8.0, np.asarray([2.5, 5.0]))
    fill = TARGETS["temporal"].fill(targets, 0, fewer, BUCKET)
    assert fill["saliency"].tolist() == [1, 0.25, -1, -1, -1, -1, -1, -1]
    fill = TARGETS["temporal"].fill({"windows": [[0, 8]]}, 0, VIEW, BUCKET)
    assert (fill["saliency"] == -1).all()


def test_masks_are_those_of_the_nearest_time_and_null_is_absent():
    targets = {"times": [0.5, 2.5, 4.5], "rles": [square_rle(16, 4, 12), None, square_rle(16)]}
    fill = TARGETS["mask"].fill(targets, 0, VIEW, BUCKET)
    area = fill["masks"].sum((1, 2))
    # Spacing 2 s: labelled up to 1 s from an annotation; 1.5 is nearest to 0.5 (the earlier).
    assert fill["labelled"].tolist() == [True] * 6 + [False, False]
    assert area.tolist() == [64, 64, 0, 0, 64, 64, 0, 0]
    assert fill["masks"][0, 4:12, 4:12].all()


def test_masks_of_another_size_are_resized_by_area():
    mask = np.zeros((48, 64), np.uint8)
    mask[12:36, 16:48] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rle = {"size": [48, 64], "counts": rle["counts"].decode()}
    fill = TARGETS["mask"].fill({"times": [0.5], "rles": [rle]}, 0, VIEW, BUCKET)
    expected = np.zeros((16, 16), np.uint8)
    expected[4:12, 4:12] = 1
    np.testing.assert_array_equal(fill["masks"][0], expected)


def test_tracking_without_masks_is_labelled_by_its_boxes():
    targets = {"times": [0.5, 1.5], "boxes": [[0.25, 0.5, 0.75, 1.0], None],
               "input_box": [0, 0, 1, 1]}
    TARGETS["mask"].check(targets, 1, VIEW, BUCKET)
    fill = TARGETS["mask"].fill(targets, 0, VIEW, BUCKET)
    assert fill["masks"][0, 8:, 4:12].all() and fill["masks"][0].sum() == 64
    assert not fill["masks"][1].any()
    assert fill["labelled"].tolist() == [True, True] + [False] * 6
    tiny = targets | {"boxes": [[0.51, 0.51, 0.512, 0.512], None]}
    assert TARGETS["mask"].fill(tiny, 0, VIEW, BUCKET)["masks"].sum() == 1


BOXES = [None, None, [0.25, 0.5, 0.75, 1.0], [0.5, 0.5, 1.0, 1.0], None]
LATE = {"times": [0.5, 1.5, 2.5, 3.5, 4.5], "boxes": BOXES, "input_box": BOXES[2]}


@pytest.mark.parametrize("changes, shown, box, frame", [
    ({"boxes": BOXES[2:] + [None] * 2}, [0.5, 1.5], BOXES[2], 0),  # there from the start
    ({}, np.arange(8) + 0.5, BOXES[2], 2),  # the object comes late
    ({"input_box": [0.2, 0.5, 0.7, 1.0]}, np.arange(8) + 0.5, [0.2, 0.5, 0.7, 1.0], 2),  # by hand
    ({"input_time": 3.5}, np.arange(8) + 0.5, BOXES[2], 3),
    ({}, [0.5, 3.5, 6.5], BOXES[3], 1),  # its own frame is not shown: the label of another
    ({"input_time": 3.5}, [0.5, 2.5, 4.5], BOXES[2], 1),
    ({}, [2.3, 2.4, 2.6], BOXES[2], 1),  # the frame nearest to the label
    ({}, [0.5, 4.5], BOXES[2], 0),  # no frame shows it
])
def test_a_followed_box_is_on_a_frame_that_shows_the_object(changes, shown, box, frame):
    view = View(0.0, 8.0, np.asarray(shown))
    fill = slot_target("box", "tracking").fill(LATE | changes, 0, view, BUCKET)
    np.testing.assert_array_equal(fill["boxes"], np.asarray(box, np.float32))
    assert fill["frame"] == frame and fill["frame"].dtype == np.int32


def test_another_box_is_on_the_frame_nearest_to_its_time():
    """Boxes of a region answer are no labels of the box in the question."""
    targets = {"boxes": [BOXES[3]], "times": [6.5], "input_box": BOXES[2]}
    for time, frame in ((None, 0), (0.0, 0), (3.4, 3), (99.0, 7)):
        fill = slot_target("box", "region").fill(targets | {"input_time": time}, 0, VIEW, BUCKET)
        assert fill["frame"] == frame
        np.testing.assert_array_equal(fill["boxes"], np.asarray(BOXES[2], np.float32))
    assert slot_target("box", "region").fill(targets, 0, VIEW, BUCKET)["frame"] == 0


EACH = {
    "temporal": {"each": [{"windows": [[1, 2]]}, {"windows": [[4, 8], [0, 2]]}]},
    "mask": {"each": [{"times": [1.0], "rles": [square_rle()]}, {"times": [6.5], "rles": [None]}]},
    "box": {"input_boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], "input_times": [None, 3.4]},
}


def test_several_of_one_kind_are_one_slot_each():
    filled = {}
    for head, targets in EACH.items():
        TARGETS[head].check(targets, 2, VIEW, BUCKET)
        filled[head] = [TARGETS[head].fill(targets, i, VIEW, BUCKET) for i in range(2)]
    first, second = filled["temporal"]
    assert first["windows"].tolist() == [[0.125, 0.25], [0, 0]]
    assert second["windows"].tolist() == [[0.5, 1], [0, 0.25]] and second["window_valid"].all()
    first, second = filled["mask"]
    assert np.flatnonzero(first["labelled"]).tolist() == [0, 1] and first["masks"].any()
    assert np.flatnonzero(second["labelled"]).tolist() == [6] and not second["masks"].any()
    first, second = filled["box"]
    assert first["boxes"].tolist() == [0, 0, 0.5, 0.5] and first["frame"] == 0
    assert second["boxes"].tolist() == [0.5, 0.5, 1, 1] and second["frame"] == 3


def test_each_track_follows_its_own_box():
    """The second is drawn, and labelled, at 6.5 s; the first has no time, so its first label."""
    targets = {
        "each": [{"times": [2.5], "boxes": [[0, 0, 0.5, 0.5]]},
                 {"times": [6.5], "boxes": [[0.5, 0.5, 1, 1]]}],
        "input_boxes": [[0, 0, 0.25, 0.5], [0.5, 0.5, 0.75, 1]], "input_times": [None, 6.5]}
    fills = [slot_target("box", "tracking").fill(targets, i, VIEW, BUCKET) for i in range(2)]
    assert [fill["frame"].tolist() for fill in fills] == [2, 6]
    assert [fill["boxes"].tolist() for fill in fills] == targets["input_boxes"]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_area_resize_keeps_the_mean_and_constants(h, w, size):
    image = np.random.default_rng(h * 41 + w).integers(0, 255, (1, h, w)).astype(np.uint8)
    resized = area_resize(image, size, size)
    assert resized.shape == (1, size, size)
    assert resized.mean() == pytest.approx(image.mean(), abs=0.01)
    np.testing.assert_allclose(area_resize(np.full((1, h, w, 3), 7), size, size), 7, rtol=1e-5)


def test_area_resize_by_a_whole_factor_is_the_block_mean():
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    expected = image.reshape(1, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(area_resize(image, 4, 4), expected)


@pytest.mark.parametrize("head, targets, markers, message", [
    ("region", {}, 1, "targets.boxes: missing, but the text has <region>"),
    ("region", {"boxes": [[0, 0, 1, 1]], "times": [1.0]}, 2, "1 boxes for 2 <region> markers"),
    ("region", {"boxes": [[0, 0, 1, 1]], "times": []}, 1, "lengths"),
    ("region", {"boxes": [[0.5, 0, 1.5, 1]], "times": [1]}, 1, r"boxes\[0\].*normalised"),
    ("temporal", {"windows": [[9, 10]]}, 1, "none of .* meets the clip"),
    ("temporal", {"windows": [[0, 1], [2, 3], [4, 5]]}, 1, "Raise buckets.b.windows"),
    ("temporal", {"windows": [[0, 1]]}, 2, "2 markers <temporal>, expected one"),
    ("temporal", {"windows": [[0, 1]], "saliency": [1.0]}, 1, "saliency_interval: missing"),
    ("mask", {"times": [0]}, 1, "targets.boxes: missing"),
    ("mask", {"times": [0, 1], "rles": [None]}, 1, "lengths"),
    ("box", {"input_box": [0, 0, 0, 1]}, 1, "input_box"),
    ("temporal", EACH["temporal"], 3, "targets.each: 2 entries for 3 <temporal>"),
    ("temporal", {"each": [{"windows": [[1, 2]]}, {}]}, 2, "targets.windows: missing"),
    ("mask", EACH["mask"], 1, "targets.each: 2 entries for 1 <mask>"),
    ("box", EACH["box"], 1, "targets.input_boxes: 2 entries for 1 <box>"),
    ("box", {"input_box": [0, 0, 1, 1]}, 2, "2 markers <box>, expected one"),
])
def test_wrong_targets_are_named(head, targets, markers, message):
    with pytest.raises(TargetError, match=message):
        TARGETS[head].check(targets, markers, VIEW, BUCKET)
