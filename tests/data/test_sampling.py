"""Frame samplers: properties over arbitrary timestamps, and the easy mistakes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpo_jax.data import sampling

# Variable frame rate: positive gaps from 1 ms to 1 s.
timestamps = st.lists(st.integers(1, 1000), min_size=0, max_size=120).map(
    lambda gaps: np.concatenate([[0.0], np.cumsum(gaps) / 1000]).astype(np.float32))
counts = st.integers(1, 40)


@st.composite
def clips(draw):
    """Timestamps and a [start, end] inside them."""
    times = draw(timestamps)
    a, b = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return times, float(a * times[-1]), float(b * times[-1])


def check_indices(indices, times, count):
    assert indices.dtype == np.int64 and len(indices) <= count
    assert (np.diff(indices) >= 0).all()
    assert 0 <= indices[0] and indices[-1] < len(times)


@given(clips(), counts)
def test_uniform_is_sorted_in_range_and_complete(clip, count):
    times, start, end = clip
    indices = sampling.uniform(times, count, start, end)
    check_indices(indices, times, count)
    assert len(indices) == count
    inside = sampling.frames_between(times, start, end)
    assert set(indices) <= set(inside)


@given(timestamps, counts)
def test_uniform_takes_the_nearest_frame(times, count):
    end = float(times[-1]) + 1.0
    indices = sampling.uniform(times, count, 0.0, end)
    for i, index in enumerate(indices):
        wanted = (i + 0.5) * end / count
        best = np.abs(times.astype(np.float64) - wanted).min()
        assert abs(float(times[index]) - wanted) == pytest.approx(best, abs=1e-6)


def test_uniform_on_the_world():
    times = np.arange(128) / 8
    indices = sampling.uniform(times, 32, 0.0, 16.0)
    assert indices.tolist() == list(range(2, 128, 4))
    assert sampling.uniform(times, 32).tolist() == indices.tolist()
    assert sampling.uniform(times, 1).tolist() == [64]


def test_a_model_is_shown_all_of_a_clip_that_has_no_more_frames():
    """Half of the world's frames are uniform ones; of few, uneven ones none is left out."""
    times = np.arange(64) / 2
    assert sampling.shown("uniform", times, 32, 0.0, 32.0).tolist() == list(range(1, 64, 2))
    uneven = np.array([0.0, 0.48, 1.0, 1.48, 2.0, 2.48])
    assert len(set(sampling.uniform(uneven, 6, 0.0, 3.0))) < 6
    for count in (6, 8):
        assert sampling.shown("uniform", uneven, count, 0.0, 3.0).tolist() == list(range(6))
    assert sampling.shown("evenly", uneven, 8, 0.0, 3.0).tolist() == [0, 0, 1, 2, 2, 3, 4, 5]


def test_uniform_follows_time_not_frame_number():
    times = np.concatenate([np.arange(80) / 10, [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0]])
    seen = times[sampling.uniform(times, 4, 0.0, 16.0)]
    assert seen.tolist() == [2.0, 6.0, 10.0, 14.0]


def test_uniform_repeats_frames_of_a_short_video():
    assert sampling.uniform(np.asarray([0.0]), 3).tolist() == [0, 0, 0]
    assert sampling.uniform(np.asarray([0.0, 1.0]), 4).tolist() == [0, 1, 1, 1]


@given(clips(), counts)
def test_dense_segment_is_distinct_and_inside(clip, count):
    times, start, end = clip
    indices = sampling.dense_segment(times, count, start, end)
    check_indices(indices, times, count)
    inside = sampling.frames_between(times, start, end)
    assert len(set(indices)) == len(indices) == min(count, len(inside))
    assert set(indices) <= set(inside)


@given(clips(), counts)
def test_excluding_never_touches_the_segment(clip, count):
    times, start, end = clip
    outside = (times < start) | (times > end)
    if not outside.any():
        with pytest.raises(ValueError, match="nothing is left"):
            sampling.excluding(times, count, [(start, end)])
        return
    indices = sampling.excluding(times, count, [(start, end)])
    check_indices(indices, times, count)
    assert len(set(indices)) == len(indices) == min(count, outside.sum())
    assert outside[indices].all()


def test_excluding_several_segments_within_a_clip():
    times = np.arange(10.0)
    indices = sampling.excluding(times, 10, [(0.0, 2.0), (5.0, 6.0)], 1.0, 8.0)
    assert indices.tolist() == [3, 4, 7, 8]


@given(st.integers(1, 60), st.data())
def test_random_subset_is_a_pure_function_of_the_seed(size, data):
    indices = np.sort(np.random.default_rng(size).integers(0, 1000, size))
    count, seed = data.draw(st.integers(1, size)), data.draw(st.integers(0, 2**31))
    subset = sampling.random_subset(indices, count, seed)
    assert len(subset) == count and (np.diff(subset) >= 0).all()
    remaining = list(indices)
    for index in subset:
        remaining.remove(index)  # without replacement
    assert (subset == sampling.random_subset(indices, count, seed)).all()


def test_random_subset_depends_on_the_seed():
    draws = {tuple(sampling.random_subset(np.arange(100), 10, seed)) for seed in range(20)}
    assert len(draws) == 20


def test_frames_between_keeps_float32_borders():
    times = (np.arange(30) / 10).astype(np.float32)  # 0.7 is 0.69999999 or 0.7000000 in float32
    assert sampling.frames_between(times, 0.7, 1.1).tolist() == [7, 8, 9, 10, 11]
    assert sampling.frames_between(times, 0.62, 0.66).tolist() == [6]


@pytest.mark.parametrize("call, message", [
    (lambda: sampling.uniform(np.zeros(0), 4), "timestamps"),
    (lambda: sampling.uniform(np.arange(4.0), 0), "count: 0"),
    (lambda: sampling.uniform(np.arange(4.0), 2, 3.0, 1.0), "start 3.0 s, end 1.0 s"),
    (lambda: sampling.random_subset(np.arange(3), 4, 0), "count: 4"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_at_less_than_a_frame_in_two_seconds_every_frame_is_shown():
    """Published code, which families' formulas are compared with, has a step of 0 there."""
    assert sampling.frames_at_one_fps(3, 0.4, 64).tolist() == [0, 1, 2]


def test_published_samplers_choose_among_the_frames_of_the_interval():
    times = np.arange(200) / 10  # twenty seconds at ten frames a second
    number = {name: sample(times, 4, 5.0, 14.9) for name, sample in sampling.SAMPLERS.items()}
    assert number["evenly"].tolist() == [50, 83, 116, 149]
    assert number["middles"].tolist() == [62, 87, 112, 137]
    assert number["frames_at_one_fps"].tolist() == number["evenly"].tolist()
    one_fps = sampling.SAMPLERS["frames_at_one_fps"](times, 64, 5.0, 14.9)
    assert one_fps.tolist() == list(range(50, 150, 10))
    assert sampling.SAMPLERS["evenly"](times, 3, 5.0, 5.0).tolist() == [50, 50, 50]
