"""Rows, mixture and pipeline on an in-memory data set."""

import dataclasses

import grain
import jax
import numpy as np
import pytest
from fake_dataset import FakeDataset, all_tasks, example, fake_dataset, video_info
from hypothesis import given, settings
from hypothesis import strategies as st

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline, blank_batch, row_builder
from tpo_jax.data.records import Turn
from tpo_jax.data.rows import BranchPlan, RowError, RowPlan, row_id
from tpo_jax.data.text import TextCodec, add_task_tokens, texts_of, train_tokenizer
from tpo_jax.models.presets import micro

HEADS = ("region", "temporal", "mask")
TASKS = {"conversation": 2.0, "temporal": 1.0, "region": 1.0, "mask": 1.0, "tracking": 1.0,
         "preference": 1.0}
VIDEO = Bucket("video", "video", 4, frames=8, branches=4, branch_tokens=56, answers=40,
               slots={"region": 3, "temporal": 2, "mask": 1}, windows=2, mask_size=16, weight=3.0)
IMAGE = Bucket("image", "image", 4, frames=1, branches=2, branch_tokens=56, answers=40, windows=1,
               mask_size=16)
PAIR = Bucket("pair", "video", 4, frames=8, branches=2, branch_tokens=40, answers=36, question=16,
              windows=1, mask_size=16)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    tokenizer = train_tokenizer(texts_of(fake_dataset()))
    add_task_tokens(tokenizer, HEADS)
    return TextCodec(tokenizer)


@pytest.fixture(scope="module")
def model(codec):
    return micro(HEADS, codec.task_tokens)


def make(codec, model, dataset=None, buckets=(VIDEO, IMAGE, PAIR), seed=0, **kwargs) -> Pipeline:
    source = Source(dataset or fake_dataset(), 1.0, TASKS)
    return Pipeline([source], codec, model, HEADS, buckets, seed, **kwargs)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- random access, hosts, iterator ---


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_hosts(codec, model, hosts):
    one = make(codec, model)
    many = [make(codec, model, process_index=i, process_count=hosts) for i in range(hosts)]
    for step in range(8):
        name, whole = one.batch(step)
        parts = [pipeline.batch(step) for pipeline in many]
        assert {part[0] for part in parts} == {name}
        assert_same(jax.tree.map(lambda *x: np.concatenate(x), *[part[1] for part in parts]), whole)


def test_a_bucket_beside_another_is_part_of_its_batch(codec, model):
    joint = dataclasses.replace(VIDEO, beside="image")
    pipeline = make(codec, model, buckets=(joint, IMAGE, PAIR))
    assert set(pipeline.builders) == {"video", "pair"}
    steps = (step for step in range(64) if pipeline.batch(step)[0] == "video")
    _, first = pipeline.batch(next(steps))
    _, second = pipeline.batch(next(steps))
    assert first["beside"]["frames"].shape[1] == 1 and first["frames"].shape[1] == 8
    assert first["beside"]["branch_segments"].any()
    assert (first["beside"]["example_ids"] != second["beside"]["example_ids"]).all()
    shapes = jax.tree.map(np.shape, blank_batch(pipeline.builders["video"]))
    assert shapes == jax.tree.map(np.shape, first)
    alone = make(codec, model, buckets=(VIDEO, IMAGE, PAIR))
    step = next(step for step in range(64) if alone.batch(step)[0] == "image")
    assert_same(first["beside"], alone.batch(step)[1])


def test_batches_are_a_function_of_seed_and_step(codec, model):
    first, second = make(codec, model), make(codec, model)
    steps = [7, 0, 3, 7]  # any order, repeats
    for step in steps:
        assert first.batch(step)[0] == second.batch(step)[0]
        assert_same(first.batch(step)[1], second.batch(step)[1])
    other = make(codec, model, seed=1)
    assert any((other.batch(s)[1]["branch_tokens"] != first.batch(s)[1]["branch_tokens"]).any()
               for s in range(3) if other.batch(s)[0] == "video")


def test_batch_must_divide_over_hosts(codec, model):
    with pytest.raises(ValueError, match="buckets.video.batch_size: 4 rows do not divide.*3 hosts"):
        make(codec, model, process_index=0, process_count=3)


def test_iterator_equals_batches_and_restores_on_other_host_counts(codec, model):
    one = make(codec, model)
    iterator = one.iterator(2)
    assert isinstance(iterator, grain.DatasetIterator)
    for step in (2, 3):
        name, batch = next(iterator)
        assert name == one.batch(step)[0]
        assert_same(batch, one.batch(step)[1])
    state = iterator.get_state()
    assert state == {"next_index": 4}
    parts = []
    for i in range(2):
        host = make(codec, model, process_index=i, process_count=2).iterator()
        next(host)
        host.set_state(state)
        parts.append(next(host)[1])
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), *parts), one.batch(4)[1])


def test_worker_processes_give_the_same_batches(codec, model):
    pipeline = make(codec, model)
    iterator = pipeline.iterator(3, workers=1)
    for step in (3, 4):
        name, batch = next(iterator)
        assert name == pipeline.batch(step)[0]
        assert_same(batch, pipeline.batch(step)[1])
    assert iterator.get_state() == {"next_index": 5}


def test_every_batch_of_a_bucket_has_the_declared_shapes(codec, model):
    pipeline = make(codec, model)
    shapes = {name: jax.tree.map(lambda x: (x.shape, x.dtype), blank_batch(builder))
              for name, builder in pipeline.builders.items()}
    for step in range(10):
        name, batch = pipeline.batch(step)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == shapes[name]
    shape, dtype = shapes["video"]["slots"]["mask"]["masks"]
    assert (shape, dtype) == ((4, 1, 8, 16, 16), np.uint8)
    assert shapes["video"]["prefix_tokens"][0] == (4, 2 + 8 + 1)
    assert shapes["pair"]["prefix_tokens"][0] == (4, 2 + 8 + 1 + 16)
    assert "reference_logps" not in shapes["pair"] and "pair_valid" in shapes["pair"]


def test_example_ids_are_stable_and_distinct(codec, model):
    pipeline = make(codec, model)
    ids = np.concatenate([pipeline.batch(s)[1]["example_ids"] for s in range(20)])
    assert ids.dtype == np.uint32 and len(set(ids)) == len(ids)
    assert row_id("video", 0) == 3838010768  # part of what a resumed run must repeat


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


# --- what a row holds ---


def rows_of(batch):
    for b in range(len(batch["example_ids"])):
        yield jax.tree.map(lambda x, b=b: x[b], batch)


def test_answers_are_predicted_by_the_token_before_them(codec, model):
    pipeline = make(codec, model)
    for step in range(8):
        for row in rows_of(pipeline.batch(step)[1]):
            for k in range(len(row["branch_tokens"])):
                n = int((row["branch_segments"][k] > 0).sum())
                tokens = row["branch_tokens"][k]
                count = int((row["answer_tokens"][k] != codec.pad_id).sum())
                positions = row["answer_positions"][k, :count]
                np.testing.assert_array_equal(
                    tokens[positions + 1], row["answer_tokens"][k, :count])
                assert not row["answer_weights"][k, count:].any()
                if n:
                    assert tokens[positions[0]] == codec.special_ids["<assistant>"]
                    assert row["answer_tokens"][k, count - 1] == codec.eos_id
                    assert positions[-1] + 2 == n
                # Slot tokens are forced: no weight.
                slots = [codec.task_tokens[t] for t in ("<boxes>", "<temp>", "<tracking>")]
                forced = np.isin(row["answer_tokens"][k, :count], slots)
                np.testing.assert_array_equal(row["answer_weights"][k, :count], ~forced)


def test_positions_restart_and_padding_has_segment_zero(codec, model):
    pipeline = make(codec, model)
    for step in range(8):
        for row in rows_of(pipeline.batch(step)[1]):
            prefix = int(row["prefix_segments"].sum())
            np.testing.assert_array_equal(
                row["prefix_positions"][row["prefix_segments"] > 0], np.arange(prefix))
            for k, segments in enumerate(row["branch_segments"]):
                n = int(segments.sum())
                np.testing.assert_array_equal(segments, np.arange(len(segments)) < n)
                np.testing.assert_array_equal(
                    row["branch_positions"][k, :n], prefix + np.arange(n))
                assert (row["branch_tokens"][k, n:] == codec.pad_id).all()
                assert not row["branch_positions"][k, n:].any()


def test_slots_point_at_their_tokens(codec, model):
    pipeline = make(codec, model)
    names = {"region": "<boxes>", "temporal": "<temp>", "mask": "<tracking>", "box": "<track_box>"}
    seen = dict.fromkeys(names, 0)
    for step in range(12):
        for row in rows_of(pipeline.batch(step)[1]):
            for head, token in names.items():
                slots = row["slots"][head]
                branch, index = slots["branch"][slots["valid"]], slots["index"][slots["valid"]]
                assert (row["branch_tokens"][branch, index] == codec.task_tokens[token]).all()
                # Every slot token of the row has its slot.
                assert (row["branch_tokens"] == codec.task_tokens[token]).sum() == len(index)
                seen[head] += len(index)
    assert all(seen.values()), seen


def test_region_slots_carry_their_own_boxes_in_order(codec, model):
    builder = row_builder(codec, model, VIDEO)
    dataset = fake_dataset()
    where = next(e for e in dataset.examples("v0") if e.task == "region")
    plan = RowPlan(dataset, "v0", 0.0, 8.0, tuple(
        BranchPlan(where, 0, t.question, t.answer) for t in where.turns))
    region = builder.build(plan, 0)["slots"]["region"]
    assert region["valid"].tolist() == [True, True, False]
    np.testing.assert_allclose(region["boxes"][:2], where.targets["boxes"], rtol=1e-6)
    assert region["frame"][:2].tolist() == [0, 6]


def test_markers_of_a_later_turn_take_the_later_boxes(codec, model):
    dataset = fake_dataset(videos=1, images=0)
    where = example("two", "v0", "region",
                    [Turn("First?", "At <region>"), Turn("Second?", "At <region>")],
                    {"boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], "times": [0.0, 0.0]})
    plan = RowPlan(dataset, "v0", 0.0, 8.0, (BranchPlan(where, 1, "Second?", "At <region>"),))
    region = row_builder(codec, model, VIDEO).build(plan, 0)["slots"]["region"]
    assert region["boxes"][0].tolist() == [0.5, 0.5, 1, 1]


def test_frames_are_those_of_their_times(codec, model):
    name, batch = make(codec, model).batch(0)
    assert name == "video" and batch["frame_valid"].all()
    np.testing.assert_allclose(batch["frame_times"][0], np.arange(8) + 0.5)
    np.testing.assert_array_equal(batch["frames"][0, :, 0, 0, 0], 4 + 8 * np.arange(8))


@settings(max_examples=40, deadline=None)
@given(stored=st.integers(1, 20), frames=st.integers(1, 8))
def test_missing_frames_are_padding_in_frames_and_prefix(codec, model, stored, frames):
    bucket = dataclasses.replace(VIDEO, frames=frames)
    dataset = FakeDataset("d", {"v": []}, {"v": video_info(stored)})
    builder = row_builder(codec, model, bucket)
    row = builder.build(RowPlan(dataset, "v", 0.0, stored / 8, ()), 0)
    shown = min(stored, frames)
    np.testing.assert_array_equal(row["frame_valid"], np.arange(frames) < shown)
    assert not row["frames"][shown:].any() and not row["frame_times"][shown:].any()
    span = slice(2, 2 + frames)
    np.testing.assert_array_equal(row["prefix_segments"][span], np.arange(frames) < shown)
    assert row["prefix_segments"].sum() == 2 + shown + 1
    assert (row["prefix_tokens"][span] == codec.pad_id).all()
    assert row["prefix_tokens"][2 + frames] == codec.special_ids["</video>"]


def test_frames_of_another_size_are_resized(codec, model):
    dataset = FakeDataset("d", {"v": []}, {"v": video_info(size=80)})
    row = row_builder(codec, model, VIDEO).build(RowPlan(dataset, "v", 0.0, 8.0, ()), 0)
    assert row["frames"].shape == (8, 32, 32, 3)
    assert (row["frames"][3] == 28).all()


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


def test_options_are_shown_half_of_the_time_in_any_order(codec, model):
    mixture = make(codec, model).mixtures["video"]
    questions = [b.question for row in range(300) for b in mixture(row).branches
                 if b.example.task == "conversation" and b.turn == 0]
    shown = [q for q in questions if " Options: " in q]
    assert 0.35 < len(shown) / len(questions) < 0.65
    orders = {tuple(q[: -1].split(" Options: ")[1].split("; ")) for q in shown}
    assert len(orders) > 12 and len({frozenset(order) for order in orders}) == 1


# --- preference pairs ---


def test_pair_rows_hold_the_question_once_and_both_answers(codec, model):
    pipeline = make(codec, model, buckets=[PAIR])
    name, batch = pipeline.batch(0)
    assert name == "pair" and batch["pair_valid"].all()
    row = next(rows_of(batch))
    prefix = codec.token_texts(row["prefix_tokens"][row["prefix_segments"] > 0])
    assert prefix[: 8] == ["<bos>", "<video>"] + ["<pad>"] * 4 + ["</video>", "<user>"]
    question = row["prefix_tokens"][(row["prefix_segments"] > 0)][8:]
    assert codec.decode(question) == "What happens first?"
    answers = [codec.decode(tokens) for tokens in row["answer_tokens"]]
    assert answers == ["The red square moves left.", "The blue star grows."]
    assert (row["branch_tokens"][:, 0] == codec.special_ids["<assistant>"]).all()
    # The frames of the pair, not uniform ones.
    np.testing.assert_array_equal(row["frames"][:4, 0, 0, 0], [0, 8, 16, 24])
    assert row["frame_valid"].tolist() == [True] * 4 + [False] * 4


def test_an_epoch_shows_every_pair_once(codec, model):
    pairs = [dataclasses.replace(all_tasks("v0")[-1], example_id=f"p{i}") for i in range(6)]
    dataset = FakeDataset("d", {"v0": pairs}, {"v0": video_info()})
    mixture = make(codec, model, dataset, [PAIR]).mixtures["pair"]
    drawn = [mixture(row).branches[0].example.example_id for row in range(6)]
    assert sorted(drawn) == [f"p{i}" for i in range(6)]


def test_reference_logps_are_looked_up_with_what_they_belong_to(codec, model):
    calls = []

    def reference(pair, frame_indices, prefix, branches):
        calls.append((pair, frame_indices.tolist(), prefix.shape, branches.shape))
        return np.full((2, 36), float(pair[1]), np.float32)

    pipeline = make(codec, model, buckets=[PAIR], reference=reference)
    assert sorted({c[0] for c in calls}) == [f"v{i}/pair" for i in range(5)]  # checked up front
    assert calls[0][1:] == ([0, 8, 16, 24], (27,), (2, 40))
    _, _, plans = pipeline.plans(0)
    _, batch = pipeline.batch(0)
    assert [float(plan.video_id[1]) for plan in plans] == batch["reference_logps"][:, 0, 0].tolist()
    with pytest.raises(RowError, match="reference_logps of shape .2, 3."):
        make(codec, model, buckets=[PAIR], reference=lambda *_: np.zeros((2, 3)))


@pytest.mark.parametrize("indices", [[0] * 9, [64], [-1]])
def test_frame_indices_of_a_pair_must_exist(codec, model, indices):
    pair = all_tasks("v")[-1]
    pair = dataclasses.replace(pair, targets=pair.targets | {"frame_indices": indices})
    dataset = FakeDataset("d", {"v": [pair]}, {"v": video_info()})
    with pytest.raises(RowError, match="frame_indices.*at most 8.*below 64"):
        make(codec, model, dataset, [PAIR])


def test_a_clip_of_few_frames_shows_each_of_them_once(codec, model):
    """At 25 frames a second those kept at 2 are uneven: one is nearer to the next one's place."""
    times = np.array([0.0, 0.48, 1.0, 1.48, 2.0, 2.48], np.float32)
    info = dataclasses.replace(video_info(6, fps=2.0), timestamps=times)
    dataset = FakeDataset("d", {"v": []}, {"v": info})
    builder = row_builder(codec, model, VIDEO)
    for start, end, want in ((0.0, 3.0, range(6)), (0.9, 2.1, (2, 3, 4))):
        indices = builder.frame_indices(RowPlan(dataset, "v", start, end, ()))
        np.testing.assert_array_equal(indices, want)


def test_preference_data_needs_a_preference_bucket(codec, model):
    with pytest.raises(ValueError, match="'preference' has a weight, but no bucket"):
        make(codec, model, buckets=[VIDEO])
    with pytest.raises(RowError, match="bucket 'pair': no video with a preference example"):
        Pipeline([Source(fake_dataset(), 1.0, {"conversation": 1.0})], codec, model, HEADS,
                 [VIDEO, PAIR], 0)


# --- errors name file, example, bucket and fix ---


def one_turn(question, answer, task="conversation", targets=None, options=()):
    examples = [example("good", "v", "conversation", [Turn("What happens?", "2")]),
                example("bad", "v", task, [Turn(question, answer, tuple(options))], targets)]
    return FakeDataset("data/train", {"v": examples}, {"v": video_info()})


@pytest.mark.parametrize("dataset, message", [
    (one_turn("Q?", "0123456789" * 5),
     "the answer has 51 tokens.*answers = 40.*Raise buckets.video.answers"),
    (one_turn("0123456789" * 5, "01234"),
     "question and answer has 58 tokens.*Raise buckets.video.branch_tokens"),
    (one_turn("Q?", ""), "answer: empty"),
    (one_turn("Q?", "<box>"), "marker '<box>'"),
    (one_turn("Q?", "a", options=("b", "c")), "answer 'a' is not one of the options"),
    (one_turn("Where?", "<region>" * 4, "region", {"boxes": [[0, 0, 1, 1]] * 4, "times": [0] * 4}),
     "4 <region> slots, but the bucket has 3. Raise buckets.video.slots.region"),
    (one_turn("When?", "<temporal>", "temporal", {"windows": []}), "none of .* meets the clip"),
])
def test_examples_that_do_not_fit_are_refused_by_name(codec, model, dataset, message):
    with pytest.raises(RowError, match=message) as error:
        source = Source(dataset, 1.0, {k: v for k, v in TASKS.items() if k != "preference"})
        Pipeline([source], codec, model, HEADS, [VIDEO], 0)
    assert "data/train: example 'bad', turn 0, bucket 'video'" in str(error.value)
    assert str(error.value).startswith("1 examples do not fit")


def test_all_offending_examples_are_reported_up_to_a_limit(codec, model):
    examples = [example(f"bad{i}", "v", "conversation", [Turn("Q?", " ")]) for i in range(30)]
    dataset = FakeDataset("d", {"v": examples}, {"v": video_info()})
    with pytest.raises(RowError, match="30 examples.*") as error:
        make(codec, model, dataset, [VIDEO, PAIR])
    assert str(error.value).count("answer: empty") == 20 and "10 more" in str(error.value)


def test_tasks_that_are_not_drawn_are_not_checked(codec, model):
    dataset = one_turn("When?", "<temporal>", "temporal", {"windows": []})
    Pipeline([Source(dataset, 1.0, {"conversation": 1.0})], codec, model, HEADS, [VIDEO], 0)


def test_head_that_the_model_lacks_is_named(codec):
    source = Source(fake_dataset(), 1.0, {"conversation": 1.0, "mask": 1.0})
    model = micro(("region",), {t: i for t, i in codec.task_tokens.items() if "track" not in t}
                  | {"<track_box>": codec.task_tokens["<track_box>"]})
    with pytest.raises(RowError, match="marker <mask>, but model.heads has no 'mask'"):
        Pipeline([source], codec, model, ("region",), [VIDEO], 0)


@pytest.mark.parametrize("bucket, message", [
    (dataclasses.replace(VIDEO, mask_size=8), "mask_size: 8, but the mask head answers at 16"),
    (dataclasses.replace(VIDEO, windows=0), "windows: 0, but the model has a temporal head"),
    (dataclasses.replace(VIDEO, frames=9), "frames: 9, but the model has vision.max_frames = 8"),
])
def test_buckets_must_fit_the_model(codec, model, bucket, message):
    with pytest.raises(ValueError, match=message):
        row_builder(codec, model, bucket)


def test_tokenizer_must_be_that_of_the_model(codec):
    with pytest.raises(ValueError, match="tokenizer: '<.*>' is .*, but the model has tokens"):
        row_builder(codec, micro(HEADS), VIDEO)


@pytest.mark.parametrize("entry, message", [
    ({"path": "nowhere", "weight": 1.0}, "unknown keys \\['tasks'\\]"),
    ({"path": "nowhere", "weight": 1.0, "tasks": {"conversation": 1.0}}, "nowhere"),
])
def test_wrong_sources_are_named(codec, model, entry, message):
    with pytest.raises(ValueError, match=message):
        Pipeline([entry], codec, model, HEADS, [VIDEO], 0)


@pytest.mark.parametrize("weight, tasks, message", [
    (0.0, {"conversation": 1.0}, "weight 0.0"),
    (1.0, {"chat": 1.0}, "tasks \\['chat'\\] unknown"),
    (1.0, {"conversation": 0.0}, "expected at least one > 0"),
])
def test_wrong_weights_are_named(weight, tasks, message):
    with pytest.raises(ValueError, match=message):
        Source(fake_dataset(path="data/train"), weight, tasks)


def test_a_checkpoints_frames_and_time_instruction_reach_the_row(codec, model):
    """Rows show the frames that its sampler takes, and say when they are, clip by clip."""
    template = dataclasses.replace(codec.template, sampling="evenly", time_instruction=True)
    timed = TextCodec(codec.tokenizer, template)
    pipeline, plain = make(timed, model), make(codec, model)
    builder = pipeline.row_builders["video"]
    assert builder.prefix_tokens == plain.row_builders["video"].prefix_tokens + timed.time_room(8)
    for step in range(6):
        name, numbers, plans = pipeline.plans(step)
        for number, plan in zip(numbers, plans, strict=True):
            row = pipeline.row_builders[name].build(plan, number)
            text = timed.decode(row["prefix_tokens"][row["prefix_segments"] > 0])
            shown = plan.dataset.video_info(plan.video_id).timestamps[
                pipeline.row_builders[name].frame_indices(plan)]
            if name == "image":
                assert "seconds" not in text
                continue
            stamps = ",".join(f"{time - plan.start:.2f}s" for time in shown)
            assert f"lasts for {plan.end - plan.start:.2f} seconds" in text
            assert f"located at {stamps}." in text
