"""Rows for evaluation: everything once, options as branches, blank padding."""

import dataclasses
import operator

import jax
import numpy as np
import pytest
from fake_dataset import FakeDataset, example, fake_dataset, video_info

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.evaluation_rows import (
    batches,
    build_option_rows,
    build_pair_rows,
    build_question_rows,
)
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Turn
from tpo_jax.data.rows import RowError

BUCKET = Bucket("video", "video", 4, frames=8, branches=8, branch_tokens=56, answers=40,
                slots={"region": 3}, windows=2, mask_size=16)


@pytest.fixture(scope="module")
def builder(codec, model):
    return row_builder(codec, model, BUCKET)


def questions(count: int) -> FakeDataset:
    turns = [Turn(f"Which {i}?", "b", ("a", "b", "c"), "order") for i in range(count)]
    return FakeDataset("d", {"v": [example("e", "v", "conversation", turns)]}, {"v": video_info()})


def test_every_option_of_every_question_is_a_branch(codec, builder):
    rows = build_option_rows(questions(5), builder)
    assert [len(row.branches) for row in rows] == [6, 6, 3]  # two questions of three options
    branches = [branch for row in rows for branch in row.branches]
    assert [(b.turn, b.option) for b in branches] == [(t, o) for t in range(5) for o in range(3)]
    assert all(b.correct == (b.option == 1) and b.kind == "order" for b in branches)
    row = builder.build(rows[0].plan, 0)
    answers = [codec.decode(tokens) for tokens in row["answer_tokens"][:6]]
    assert answers == ["a", "b", "c"] * 2
    assert "Which 1? Options: a; b; c." in codec.decode(row["branch_tokens"][3])
    hidden = build_option_rows(questions(1), builder, show_options=False)
    assert hidden[0].plan.branches[0].question == "Which 0?"


def test_options_must_fit_and_hold_the_answer(builder, model):
    small = dataclasses.replace(BUCKET, branches=2)
    builder_small = row_builder(builder.codec, model, small)
    with pytest.raises(RowError, match="d: example 'e', turn 0: 3 options.*branches = 2"):
        build_option_rows(questions(1), builder_small)
    wrong = FakeDataset("d", {"v": [example(
        "e", "v", "conversation", [Turn("Q?", "z", ("a", "b"))])]}, {"v": video_info()})
    with pytest.raises(RowError, match="answer 'z' is not one of the options"):
        build_option_rows(wrong, builder)


def test_clips_are_never_mixed_in_a_row(builder):
    turn = Turn("Which?", "b", ("a", "b"), "order")
    dataset = FakeDataset("d", {"v": [
        example(f"e{i}", "v", "conversation", [turn], start=float(i % 2)) for i in range(4)
    ]}, {"v": video_info()})
    rows = build_option_rows(dataset, builder)
    assert [(row.plan.start, len(row.branches)) for row in rows] == [(0.0, 4), (1.0, 4)]


def test_question_rows_are_prompts_or_forced_answers(codec, builder):
    dataset = fake_dataset(videos=2, images=1)
    tasks = ("temporal", "region", "mask", "tracking")
    prompts = build_question_rows(dataset, builder, tasks, with_answers=False)
    asked = [b.example.example_id for plan in prompts for b in plan.branches]
    assert len(set(asked)) == len(asked) == 8
    row = builder.build(prompts[0], 0)
    assert not row["answer_weights"].any() and row["branch_segments"].any()
    forced = build_question_rows(dataset, builder, tasks, with_answers=True)
    masks = [sum("<mask>" in b.answer for b in plan.branches) for plan in forced]
    assert max(masks) == 1 and sum(masks) == 4  # the bucket has one mask slot
    assert all(builder.build(plan, 0)["slots"]["mask"]["valid"].sum() == n
               for plan, n in zip(forced, masks, strict=True))


def test_pair_rows(builder):
    rows = build_pair_rows(fake_dataset(videos=3, images=1))
    assert [row.branches[0].example.example_id for row in rows] == [f"v{i}/pair" for i in range(3)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_show_every_plan_once_and_pad_with_blanks(builder, hosts):
    plans = build_question_rows(fake_dataset(videos=7, images=0), builder, ("conversation",), True)
    shown, ids = [], []
    per_host = [list(batches(builder, plans, i, hosts)) for i in range(hosts)]
    assert {len(host) for host in per_host} == {2}
    for step in range(2):
        for host in per_host:
            batch, mine = host[step]
            assert len(batch["example_ids"]) == 4 // hosts
            shown += [plan.video_id for plan in mine]
            ids.append(batch)
            blank = jax.tree.map(operator.itemgetter(slice(len(mine), None)), batch)
            assert not blank["answer_weights"].any() and not blank["prefix_segments"].any()
            assert not any(slots["valid"].any() for slots in blank["slots"].values())
    assert shown == [f"v{i}" for i in range(7)]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *ids)
    expected = [batch for batch, _ in batches(builder, plans)]
    jax.tree.map(np.testing.assert_array_equal, whole,
                 jax.tree.map(lambda *x: np.concatenate(x), *expected))
