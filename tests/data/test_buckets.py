"""Buckets and their schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpo_jax.data.buckets import PERIOD, Bucket, BucketSchedule, scheduled


def bucket(name="b", **changes) -> Bucket:
    fields = dict(media="video", batch_size=4, frames=8, branches=2, branch_tokens=16, answers=8)
    return Bucket(name, **(fields | changes))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 500))
def test_schedule_counts_occurrences_and_keeps_proportions(weights, steps):
    schedule = BucketSchedule([bucket(str(i), weight=w) for i, w in enumerate(weights)])
    seen = {str(i): 0 for i in range(len(weights))}
    for step in range(steps):
        drawn, occurrence = schedule(step)
        assert occurrence == seen[drawn.name]
        seen[drawn.name] += 1
    period = len(schedule.pattern)
    assert sum(schedule.counts) == period == (1 if len(weights) == 1 else PERIOD)
    for weight, count in zip(weights, schedule.counts, strict=True):
        assert count >= 1
        exact = weight / sum(weights) * period
        # Within one of the exact share, but for what lifting tiny buckets to one each costs.
        assert exact - len(weights) <= count <= exact + 1


def test_buckets_are_spread_evenly():
    a, b = bucket("a", weight=3.0), bucket("b", weight=1.0)
    schedule = BucketSchedule([a, b])
    assert schedule.counts == (48, 16)
    assert (schedule.share(a), schedule.share(b)) == (0.75, 0.25)
    names = [schedule(step)[0].name for step in range(200)]
    assert all(names[i : i + 4].count("b") == 1 for i in range(0, 200, 4))


@pytest.mark.parametrize("changes, message", [
    ({"media": "audio"}, "buckets.b.media: 'audio'"),
    ({"frames": 0}, "buckets.b.frames: 0"),
    ({"answers": 16}, "buckets.b.answers: 16, expected less than branch_tokens"),
    ({"question": 8, "branches": 1}, "buckets.b: question 8 and branches 1"),
    ({"weight": 0.0}, "buckets.b.weight"),
    ({"slots": {"depth": 1}}, "buckets.b.slots: unknown.*depth"),
    ({"slots": {"mask": 0}}, "buckets.b.slots.mask: 0"),
    ({"slots": {"mask": 1}, "idle": ("mask",)}, "buckets.b.idle: 'mask'.*slots does not name"),
    ({"idle": ("depth",)}, "buckets.b.idle: 'depth'"),
])
def test_wrong_buckets_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        bucket(**changes)


def test_from_config():
    config = dict(media="image", batch_size=2, frames=1, branches=1, branch_tokens=9, answers=4)
    read = Bucket.from_config("still", config)
    assert (read.name, read.kind, read.capacity("mask")) == ("still", "conversation", 1)
    with pytest.raises(ValueError, match="buckets.still: unknown keys \\['fps'\\]"):
        Bucket.from_config("still", config | {"fps": 2})


def test_no_buckets():
    with pytest.raises(ValueError, match="buckets: none"):
        BucketSchedule([])


def test_a_bucket_beside_another_has_no_steps_of_its_own():
    buckets = [bucket("video", beside="image"), bucket("image", media="image", frames=1)]
    assert [b.name for b in scheduled(buckets)] == ["video"]
    assert [b.name for b in scheduled([bucket("a"), bucket("b")])] == ["a", "b"]


def test_what_is_idle_has_no_slot():
    config = dict(media="image", batch_size=2, frames=1, branches=1, branch_tokens=9, answers=4,
                  idle=["mask"], slots={"region": 3})
    read = Bucket.from_config("still", config)
    assert [read.capacity(task) for task in ("mask", "region", "temporal")] == [0, 3, 1]
    joint = [bucket("video", beside="image"), bucket("image", idle=("mask",))]
    with pytest.raises(ValueError, match="buckets.video.idle.*a step has the losses of both"):
        scheduled(joint)


@pytest.mark.parametrize("buckets", [
    [bucket("video", beside="image")],
    [bucket("video", beside="video")],
    [bucket("a", beside="b"), bucket("b", beside="c"), bucket("c")],
    [bucket("video", beside="pairs"), bucket("pairs", question=4)],
])  # fmt: skip
def test_what_cannot_stand_beside_is_refused(buckets):
    with pytest.raises(ValueError, match="beside: .* expected another bucket of kind"):
        scheduled(buckets)
