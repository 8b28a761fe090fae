"""Sources of a mixture come, go and are re-weighted at a checkpoint; hosts come and go."""

import collections
import json

import jax
import numpy as np
import pytest
from fake_dataset import fake_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import HEADS

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.shares import Share, Shares, SourceTable, change
from tpo_jax.models.presets import micro

TASKS = {"conversation": 2.0, "temporal": 1.0, "region": 1.0, "preference": 1.0}
SHAPE = {"frames": 8, "answers": 40, "windows": 2, "mask_size": 16}
BUCKETS = (
    Bucket("video", "video", 8, branches=4, branch_tokens=56,
           slots={"region": 3, "temporal": 2}, weight=2.0, **SHAPE),
    Bucket("pair", "video", 8, branches=2, branch_tokens=48, question=16, **SHAPE),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 1000))
def test_every_row_has_one_source_and_positions_have_no_gap(weights, first):
    weights[0] += 1
    shares = Shares({n: Share(w / 4, start=n) for n, w in enumerate(weights)}, first)
    counts = collections.Counter({n: n for n in range(len(weights))})
    for row in range(first, first + 200):
        source, position = shares(row)
        assert position == counts[source]
        counts[source] += 1
    for n, weight in enumerate(weights):
        # Rounding down once a source: no share is off by more rows than there are sources.
        assert abs(counts[n] - n - 200 * weight / sum(weights)) <= len(weights)


def test_rows_before_a_change_are_refused():
    with pytest.raises(ValueError, match="row 3: the sources changed at row 4"):
        Shares({0: Share(1.0)}, 4)(3)


def test_a_source_that_comes_back_goes_on_where_it_stopped():
    rows = {"b": 10}
    first = change(None, 0, ["x", "y"], {"b": {0: 1.0, 1: 1.0}}, {"b": 0})
    without = change(first, 5, ["y"], {"b": {1: 1.0}}, rows)
    back = change(without, 9, ["x", "z", "y"], {"b": {0: 1.0, 2: 1.0, 1: 1.0}}, {"b": 18})
    assert back.sources == ("x", "y", "z")
    starts = {n: share.start for n, share in back.buckets["b"].shares.items()}
    assert starts == {0: 5, 1: 13, 2: 0}  # y: 5 in the first rows, all 8 of the next
    assert change(back, 12, ["y", "x", "z"], {"b": {1: 1.0, 0: 1.0, 2: 1.0}}, rows) is back
    again = SourceTable.from_json(json.loads(json.dumps(back.to_json())))
    assert again.to_json() == back.to_json()


def make(codec, weights, **options):
    """A pipeline of some of the sources a, b, c."""
    sources = [Source(fake_dataset(path=name), weight, TASKS) for name, weight in weights.items()]
    model = micro(HEADS, codec.task_tokens)
    return Pipeline(sources, codec, model, HEADS, BUCKETS, 0, **options)


def given_by(pipeline, steps, source):
    """What a source gives in some steps, in order, by bucket: video and questions of each row."""
    given = collections.defaultdict(list)
    for step in steps:
        name, _, plans = pipeline.plans(step)
        given[name] += [
            (p.video_id, [b.question for b in p.branches])
            for p in plans if str(p.dataset.path) == source
        ]  # fmt: skip
    return given


def test_changed_sources_do_not_disturb_the_others(codec):
    """a is re-weighted, b removed and c added at step 7; what a gives is what it would have given.
    """
    before = make(codec, {"a": 1.0, "b": 2.0})
    table = json.loads(json.dumps(before.table.to_json()))
    after = make(codec, {"c": 1.0, "a": 3.0}, table=table, start_step=7)
    alone = make(codec, {"a": 1.0, "b": 2.0})
    for source, steps in (("a", 40), ("c", 40)):
        changed = given_by(before, range(7), source)
        for name, rows in given_by(after, range(7, 7 + steps), source).items():
            changed[name] += rows
        whole = given_by(alone if source == "a" else make(codec, {"x": 1.0, "y": 1.0, "c": 1.0}),
                         range(200), source)  # fmt: skip
        for name, rows in changed.items():
            assert len(rows) > 10 and rows == whole[name][: len(rows)], (source, name)
    assert not any(given_by(after, range(7, 47), "b").values())


def test_the_same_sources_in_another_order_change_nothing(codec):
    before = make(codec, {"a": 1.0, "b": 2.0})
    again = make(codec, {"b": 2.0, "a": 1.0}, table=before.table.to_json(), start_step=3)
    for step in range(3, 9):
        one, two = before.batch(step), again.batch(step)
        assert one[0] == two[0]
        jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


def test_four_hosts_then_two_then_eight_read_the_same_global_batches(codec):
    """With weights, two buckets, shared prefixes and reference log-probabilities."""

    def reference(pair, frames, stored, prefix, branches):
        return np.full((2, 40), float(len(pair) + branches.sum() % 97), np.float32)

    whole = make(codec, {"a": 1.0, "b": 2.0}, reference=reference)
    state, step, seen = {"next_index": 0}, 0, set()
    for hosts in (4, 2, 8):
        pipelines = [
            make(codec, {"a": 1.0, "b": 2.0}, process_index=i, process_count=hosts,
                 reference=reference, table=whole.table.to_json(), start_step=step)
            for i in range(hosts)
        ]  # fmt: skip
        iterators = [pipeline.iterator(threads=1, prefetch=1) for pipeline in pipelines]
        for iterator in iterators:
            iterator.set_state(state)
        for _ in range(3):
            parts = [next(iterator) for iterator in iterators]
            name, want = whole.batch(step)
            assert {part[0] for part in parts} == {name}
            got = jax.tree.map(lambda *x: np.concatenate(x), *[part[1] for part in parts])
            jax.tree.map(np.testing.assert_array_equal, got, want)
            seen.add(name)
            step += 1
        (state,) = {json.dumps(iterator.get_state()) for iterator in iterators}
        state = json.loads(state)
    assert state == {"next_index": 9} and seen == {"video", "pair"}


def test_skipped_examples_leave_every_other_row_as_it_is(codec):
    plain, skipping = make(codec, {"a": 1.0}), make(codec, {"a": 1.0})
    _, rows = plain.describe_batch(0)
    video = rows[0]["video"]
    skipping.skip(rows[0]["examples"])
    changed = 0
    for step in range(6):
        _, described = plain.describe_batch(step)
        (_, one), (_, two) = plain.batch(step), skipping.batch(step)
        for i, row in enumerate(described):
            skipped = bool(set(row["examples"]) & set(rows[0]["examples"]))
            assert not skipped or row["video"] == video
            changed += skipped
            assert two["answer_weights"][i].any() != skipped
            if not skipped:
                jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), one, two)
    assert changed
