"""Intervals: coverage, clustering by video, pairing."""

import numpy as np
import pytest

from tpo_jax.evaluation.bootstrap import ItemScores, Weighted, interval, paired_difference


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


def areas(seed):
    """(intersection, union) of 40 images, some of which are empty."""
    rng = np.random.default_rng(seed)
    unions = rng.integers(0, 500, 40) * (rng.random(40) < 0.8)
    return np.rint(unions * rng.random(40)), unions


def pooled(parts, wholes):
    """Two images a video."""
    shares = zip(parts, wholes, strict=True)
    return ItemScores.of(
        (f"q{i}", f"v{i // 2:02d}", Weighted(part / whole if whole else 1.0, whole))
        for i, (part, whole) in enumerate(shares)
    )


def test_weighted_values_are_pooled():
    one, two = pooled(*areas(0)), pooled(*areas(1))
    (parts, wholes), (others, bases) = areas(0), areas(1)
    assert one.mean() == pytest.approx(parts.sum() / wholes.sum())
    again = ItemScores.from_json(one.to_json())
    assert again.weights == one.weights and again.mean() == pytest.approx(one.mean(), abs=1e-6)
    assert list(ItemScores.of(one.rows()).rows()) == list(one.rows())
    # Draws of whole videos, by hand; parts and wholes are summed in each.
    draws = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=2000)
    sums = [draws @ of.reshape(20, 2).sum(1) for of in (parts, wholes, others, bases)]
    expected = np.quantile(sums[0] / sums[1], [0.025, 0.975])
    np.testing.assert_allclose(interval(one), expected)
    change = paired_difference(one, two)
    assert change.value == pytest.approx(two.mean() - one.mean())
    expected = np.quantile(sums[2] / sums[3] - sums[0] / sums[1], [0.025, 0.975])
    np.testing.assert_allclose((change.low, change.high), expected)


def test_without_any_weight_items_count():
    """Images without an object: what is said of each is all there is."""
    empty = ItemScores.of([("a", "v", Weighted(1.0, 0)), ("b", "w", Weighted(0.0, 0))])
    assert empty.mean() == 0.5
    low, high = interval(empty)
    assert (low, high) == (0, 1)
    mixed = ItemScores.of([("a", "v", Weighted(1.0, 0)), ("b", "w", Weighted(0.25, 8))])
    assert mixed.mean() == 0.25 and interval(mixed) == (0.25, 1)
