"""Which video and which questions a row gets."""

import dataclasses

import pytest
from fake_dataset import FakeDataset, all_tasks, example, fake_dataset, video_info
from small_pipeline import HEADS, PAIR, VIDEO, make

from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import Turn


def test_an_epoch_shows_every_video_once(codec, model):
    dataset = fake_dataset(videos=8, images=0)
    mixture = make(codec, model, dataset, [VIDEO, PAIR]).mixtures["video"]
    epochs = [[mixture(row).video_id for row in range(8 * e, 8 * e + 8)] for e in range(3)]
    assert all(sorted(epoch) == dataset.videos for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_sources_are_mixed_by_weight(codec, model):
    sources = [Source(fake_dataset(path=path), weight, {"conversation": 1.0})
               for path, weight in (("a", 3.0), ("b", 1.0))]
    mixture = Pipeline(sources, codec, model, HEADS, [VIDEO], 0).mixtures["video"]
    paths = [mixture(row).dataset.path for row in range(400)]
    assert paths.count("a") == 300


def test_rows_draw_without_replacement_within_the_capacity(codec, model):
    mixture = make(codec, model).mixtures["video"]
    heads = {"mask": 0, "region": 0}
    for row in range(60):
        plan = mixture(row)
        drawn = [(b.example.example_id, b.turn) for b in plan.branches]
        assert 1 <= len(drawn) <= 4 and len(set(drawn)) == len(drawn)
        masks = sum(b.answer.count("<mask>") for b in plan.branches)
        regions = sum(b.answer.count("<region>") for b in plan.branches)
        assert masks <= 1 and regions <= 3
        heads["mask"] += masks
        heads["region"] += regions
        assert all(b.example.task != "preference" for b in plan.branches)
    assert heads["mask"] and heads["region"]


def test_task_weights_decide_the_first_draw(codec, model):
    source = Source(fake_dataset(), 1.0, {"conversation": 3.0, "temporal": 1.0, "mask": 0.0})
    mixture = Pipeline([source], codec, model, HEADS, [VIDEO], 0).mixtures["video"]
    tasks = [mixture(row).branches[0].example.task for row in range(400)]
    assert set(tasks) == {"conversation", "temporal"}
    assert 0.68 < tasks.count("conversation") / 400 < 0.82


def test_only_the_kinds_asked_for_are_drawn(codec, model):
    kinds = [turn.kind for v in fake_dataset().videos for e in fake_dataset().examples(v)
             if e.task == "conversation" for turn in e.turns]
    assert len(set(kinds)) > 1
    tasks = {"conversation": 1.0, "region": 1.0}
    source = Source(fake_dataset(), 1.0, tasks, kinds=(kinds[0],))
    mixture = Pipeline([source], codec, model, HEADS, [VIDEO], 0).mixtures["video"]
    branches = [branch for row in range(60) for branch in mixture(row).branches]
    drawn = {b.example.turns[b.turn].kind for b in branches if b.example.task == "conversation"}
    assert drawn == {kinds[0]}
    assert any(branch.example.task == "region" for branch in branches)


def test_branches_of_a_row_share_their_clip(codec, model):
    dataset = FakeDataset("d", {"v": [
        example(f"e{i}", "v", "conversation", [Turn("What happens?", "2")], start=i % 2 * 4.0,
                end=i % 2 * 4.0 + 4.0) for i in range(6)]}, {"v": video_info()})
    pipeline = Pipeline([Source(dataset, 1.0, {"conversation": 1.0})], codec, model, HEADS,
                        [VIDEO], 0)
    starts = set()
    for row in range(30):
        plan = pipeline.mixtures["video"](row)
        assert {(b.example.start, b.example.end) for b in plan.branches} == {(plan.start, plan.end)}
        assert len(plan.branches) == 3
        starts.add(plan.start)
        times = pipeline.builders["video"].build(plan, 0)["frame_times"]
        assert (times >= plan.start).all() and (times <= plan.end).all()
    assert starts == {0.0, 4.0}


def test_a_round_of_a_conversation_is_asked_without_those_before_it(codec, model):
    turns = [Turn(f"Question {i}?", f"Answer {i}.") for i in range(3)]
    talk = example("talk", "v", "conversation", turns)
    dataset = FakeDataset("d", {"v": [talk]}, {"v": video_info()})
    pipeline = Pipeline([Source(dataset, 1.0, {"conversation": 1.0})], codec, model, HEADS,
                        [VIDEO], 0)
    tokens = pipeline.batch(0)[1]["branch_tokens"]
    plans = pipeline.plans(0)[2]
    for plan, row in zip(plans, tokens, strict=True):
        assert sorted(branch.turn for branch in plan.branches) == [0, 1, 2]
        for branch, ids in zip(plan.branches, row, strict=False):
            alone = codec.build_branch(turns[branch.turn].question, turns[branch.turn].answer).ids
            assert ids[: len(alone)].tolist() == alone.tolist()
            assert not (ids[len(alone) :] != codec.pad_id).any()


def test_options_are_shown_half_of_the_time_in_any_order(codec, model):
    mixture = make(codec, model).mixtures["video"]
    questions = [b.question for row in range(300) for b in mixture(row).branches
                 if b.example.task == "conversation" and b.turn == 0]
    shown = [q for q in questions if " Options: " in q]
    assert 0.35 < len(shown) / len(questions) < 0.65
    orders = {tuple(q[: -1].split(" Options: ")[1].split("; ")) for q in shown}
    assert len(orders) > 12 and len({frozenset(order) for order in orders}) == 1


def test_an_epoch_shows_every_pair_once(codec, model):
    pairs = [dataclasses.replace(all_tasks("v0")[-1], example_id=f"p{i}") for i in range(6)]
    dataset = FakeDataset("d", {"v0": pairs}, {"v0": video_info()})
    mixture = make(codec, model, dataset, [PAIR]).mixtures["pair"]
    drawn = [mixture(row).branches[0].example.example_id for row in range(6)]
    assert sorted(drawn) == [f"p{i}" for i in range(6)]


@pytest.mark.parametrize("weight, tasks, message", [
    (0.0, {"conversation": 1.0}, "weight 0.0"),
    (1.0, {"chat": 1.0}, "tasks \\['chat'\\] unknown"),
    (1.0, {"conversation": 0.0}, "expected at least one > 0"),
])
def test_wrong_weights_are_named(weight, tasks, message):
    with pytest.raises(ValueError, match=message):
        Source(fake_dataset(path="data/train"), weight, tasks)
