"""Intervals: coverage, clustering by video, pairing."""

import numpy as np
import pytest

from tpo_jax.evaluation.bootstrap import ItemScores, interval, paired_difference


def scores(values, videos):
    return ItemScores.of(
        (f"q{i}", str(v), x) for i, (v, x) in enumerate(zip(videos, values, strict=True))
    )


def test_mean_counts_items_not_videos():
    assert scores([1, 1, 1, 0], [0, 0, 0, 1]).mean() == 0.75


def test_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rate = rng.beta(6, 4, 60)  # videos differ in difficulty; the mean rate is 0.6
        values = rng.random((60, 4)) < rate[:, None]
        low, high = interval(
            scores(values.ravel(), np.repeat(np.arange(60), 4)), seed=trial, resamples=400
        )
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199


def test_items_of_one_video_do_not_shrink_the_interval():
    values = np.random.default_rng(1).random(50) < 0.5
    single = interval(scores(values, range(50)))
    copies = interval(scores(np.repeat(values, 20), np.repeat(range(50), 20)))
    np.testing.assert_allclose(single, copies, atol=1e-9)
    independent = interval(scores(np.repeat(values, 20), range(1000)))
    assert np.diff(independent) < 0.5 * np.diff(copies)


def test_pairing_removes_what_both_share():
    difficulty = np.random.default_rng(2).random(100)
    before = scores(difficulty, range(100))
    after = scores(difficulty + 0.1, range(100))
    change = paired_difference(before, after)
    assert change.value == pytest.approx(0.1)
    assert (change.low, change.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert change.items == 100
    with pytest.raises(ValueError, match="share no item"):
        paired_difference(before, ItemScores(("other",), ("v",), (1.0,)))


def test_interval_is_reproducible_and_json_round_trips():
    some = scores(np.random.default_rng(3).random(30), np.arange(30) // 3)
    again = ItemScores.from_json(some.to_json())
    assert again.items == some.items and again.videos == some.videos
    np.testing.assert_allclose(again.values, some.values, atol=1e-6)
    assert interval(some, seed=5) == interval(some, seed=5)
    with pytest.raises(ValueError, match="without items"):
        ItemScores((), (), ()).mean()
