"""What a row holds, built from a plan: tokens, positions, slots, frames, and both answers."""

import dataclasses

import jax
import numpy as np
import pytest
from fake_dataset import FakeDataset, all_tasks, example, fake_dataset, video_info
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import PAIR, VIDEO, make

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Turn
from tpo_jax.data.row_plans import preference_plan
from tpo_jax.data.rows import BranchPlan, RowError, RowPlan, video_number
from tpo_jax.data.text import TextCodec


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


def test_a_box_outside_of_the_clip_is_refused_by_name(codec, model):
    """Before training, and where nothing is checked before: an evaluation builds rows alone."""
    dataset = fake_dataset(videos=1, images=0)
    where = example("far", "v0", "region", [Turn("Where?", "At <region>")],
                    {"boxes": [[0, 0, 1, 1]], "times": [5.0]})
    builder, branch = row_builder(codec, model, VIDEO), BranchPlan(where, 0, "Where?",
                                                                   "At <region>")
    builder.check(RowPlan(dataset, "v0", 0.0, 8.0, (branch,)))
    for take in (builder.check, lambda plan: builder.build(plan, 0)):
        with pytest.raises(RowError, match=r"'far', turn 0, bucket .*times\[0\]: 5.0 s, but of"):
            take(RowPlan(dataset, "v0", 0.0, 2.0, (branch,)))


def test_several_tracks_of_one_answer_have_a_slot_each(codec, model):
    """Two boxes in the question, two masks in the answer; the second of each is its own."""
    dataset = fake_dataset(videos=1, images=0)
    times, whole = [0.5, 4.5], [0.0, 0.0, 1.0, 1.0]
    both = example("both", "v0", "tracking", [Turn("Follow <box> and <box>", "<mask> <mask>")], {
        "each": [{"times": times, "boxes": boxes} for boxes in ([whole, None], [None, whole])],
        "input_boxes": [whole, [0.5, 0.5, 1.0, 1.0]], "input_times": [0.5, 4.5]})
    turn = both.turns[0]
    plan = RowPlan(dataset, "v0", 0.0, 8.0, (BranchPlan(both, 0, turn.question, turn.answer),))
    small = row_builder(codec, model, VIDEO)
    with pytest.raises(RowError, match=r"2 <\w+> slots, but the bucket has 1"):
        small.check(plan)
    bucket = dataclasses.replace(VIDEO, slots={"mask": 2, "box": 2})
    builder = row_builder(codec, model, bucket)
    builder.check(plan)
    slots = builder.build(plan, 0)["slots"]
    assert slots["mask"]["valid"].all() and slots["box"]["valid"].all()
    shown = slots["mask"]["masks"].any((-2, -1)) & slots["mask"]["labelled"]
    assert shown[0, 0] and shown[1, 4] and not shown[0, 4] and not shown[1, 0]
    assert slots["box"]["frame"].tolist() == [0, 4]
    assert slots["box"]["boxes"].tolist() == [whole, [0.5, 0.5, 1.0, 1.0]]


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


def test_a_clip_of_few_frames_shows_each_of_them_once(codec, model):
    """At 25 frames a second those kept at 2 are uneven: one is nearer to the next one's place."""
    times = np.array([0.0, 0.48, 1.0, 1.48, 2.0, 2.48], np.float32)
    info = dataclasses.replace(video_info(6, fps=2.0), timestamps=times)
    dataset = FakeDataset("d", {"v": []}, {"v": info})
    builder = row_builder(codec, model, VIDEO)
    for start, end, want in ((0.0, 3.0, range(6)), (0.9, 2.1, (2, 3, 4))):
        indices = builder.frame_indices(RowPlan(dataset, "v", start, end, ()))
        np.testing.assert_array_equal(indices, want)


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


def test_reference_logps_are_looked_up_with_what_they_belong_to(codec, model):
    calls = []

    def reference(pair, frames, stored, prefix, branches):
        calls.append((pair, frames[:, 0].tolist(), stored, prefix.shape, branches.shape))
        return np.full((2, 36), float(pair[1]), np.float32)

    pipeline = make(codec, model, buckets=[PAIR], reference=reference)
    assert sorted({c[0] for c in calls}) == [f"v{i}/pair" for i in range(5)]  # checked up front
    assert calls[0][1:] == ([0, 8, 16, 24], "32 x 32 raw", (27,), (2, 40))
    _, _, plans = pipeline.plans(0)
    _, batch = pipeline.batch(0)
    assert [float(plan.video_id[1]) for plan in plans] == batch["reference_logps"][:, 0, 0].tolist()
    with pytest.raises(RowError, match="reference_logps of shape .2, 3."):
        make(codec, model, buckets=[PAIR], reference=lambda *_: np.zeros((2, 3)))


def test_a_contrast_tells_the_times_of_the_manipulated_frames(codec, model):
    template = dataclasses.replace(codec.template, time_instruction=True)
    timed = TextCodec(codec.tokenizer, template)
    pair = all_tasks("v")[-1]
    shown = {"frame_indices": [0, 4], "manipulated_indices": [20, 60]}
    pair = dataclasses.replace(pair, targets=pair.targets | shown)
    dataset = FakeDataset("d", {"v": [pair]}, {"v": video_info()})
    builder = row_builder(timed, model, PAIR, contrast=True)
    row = builder.build(preference_plan(dataset, pair), 0)
    for side, stamps in (("", "0.00s,0.50s."), ("contrast_", "2.50s,7.50s.")):
        used = row[f"{side}prefix_segments"] > 0
        text = timed.decode(row[f"{side}prefix_tokens"][used])
        assert f"located at {stamps}" in text and text.endswith("What happens first?")
        np.testing.assert_array_equal(row[f"{side}prefix_positions"][used], np.arange(used.sum()))
    spec = batch_spec(builder.bucket, model, reference=False, contrast=True)
    want = jax.tree.map(lambda x: (x.shape[1:], x.dtype), spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), row) == want


def test_a_row_holds_every_rejected_answer_and_room_for_more(codec, model):
    pair = all_tasks("v")[-1]
    several = ["The blue star grows.", "The red square moves left and grows."]
    pair = dataclasses.replace(pair, targets=pair.targets | {"rejected": several})
    dataset = FakeDataset("d", {"v": [pair]}, {"v": video_info()})
    bucket = dataclasses.replace(PAIR, branches=4)
    shapes = []

    def reference(name, frames, stored, prefix, branches):
        shapes.append(branches.shape)
        return np.arange(3, dtype=np.float32)[:, None] * np.ones(PAIR.answers, np.float32) - 5

    builder = row_builder(codec, model, bucket, reference=reference)
    row = builder.build(preference_plan(dataset, pair), 0)
    answers = [codec.decode(tokens) for tokens in row["answer_tokens"]]
    assert answers == ["The red square moves left.", *several, ""]
    assert shapes == [(3, bucket.branch_tokens)]
    np.testing.assert_array_equal(row["reference_logps"][:, 0], [-5, -4, -3, 0])
    assert not row["answer_weights"][3].any() and not row["branch_segments"][3].any()
    for wrong in ([], ["one", 2]):
        pair = dataclasses.replace(pair, targets=pair.targets | {"rejected": wrong})
        with pytest.raises(RowError, match="targets.rejected: .*a list of such"):
            preference_plan(dataset, pair)


@pytest.mark.parametrize("indices", [[0] * 9, [64], [-1]])
def test_frame_indices_of_a_pair_must_exist(codec, model, indices):
    pair = all_tasks("v")[-1]
    pair = dataclasses.replace(pair, targets=pair.targets | {"frame_indices": indices})
    dataset = FakeDataset("d", {"v": [pair]}, {"v": video_info()})
    with pytest.raises(RowError, match="frame_indices.*at most 8.*below 64"):
        make(codec, model, dataset, [PAIR])


def test_parts_of_one_video_have_its_number():
    number = video_number("f/a_0.0_150.0.mp4")
    for same in ("f/a_60.0_210.0.mp4", "f/a_60_210.WEBM", "f/a_60.0_210.0", "f/a.mp4"):
        assert video_number(same) == number, same
    for other in ("f/b_0.0_150.0.mp4", "a_0.0_150.0.mp4", "f/a_150.0.mp4"):
        assert video_number(other) != number, other
