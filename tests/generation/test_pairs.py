import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro_model import MemoryDataset, conversation

from tpo_jax.data.records import Example, Turn, VideoInfo
from tpo_jax.generation import pairs
from tpo_jax.generation.pairs import Answer, Candidate, EvidenceSettings, FilterSettings, Question

TIMES = np.arange(64, dtype=np.float32) / 4  # 16 s
MOVE = Turn("Which way does the red circle move?", "left", ("left", "right", "up", "down"),
            "direction")


def temporal(query, windows, video="video0"):
    turn = Turn(f'When does this happen: "{query}"?', "It happens at <temporal>.")
    return Example(f"{video}/t", video, "video", "temporal", "test", 0.0, 16.0, (turn,),
                   {"windows": windows})


def question(turn=MOVE, segment=(4.0, 6.0), index=0):
    return Question(conversation("video0", [turn] * (index + 1), end=16.0), index, turn.question,
                    segment)


def plan_of(asked, settings, times=TIMES):
    """Of a video whose last frame is shown for 0.25 s."""
    times = np.asarray(times, np.float32)
    info = VideoInfo("video", float(times[-1]) + 0.25, len(times), times, 32, 32)
    return pairs.plan_evidence(asked, info, settings)


def candidate(chosen="left", rejected="right", turn=MOVE, gap=1.0, finished=(True, True),
              lengths=(2, 2)):
    asked = question(turn)
    evidence = plan_of(asked, EvidenceSettings(8))
    return Candidate(
        asked, evidence, 0, Answer(chosen, lengths[0], finished[0], -1.0),
        Answer(rejected, lengths[1], finished[1], -2.0), -1.0 - gap)


# --- evidence ---


@given(st.integers(0, 1000), st.booleans(), st.sampled_from(["dense", "whole"]))
def test_localized_frames_avoid_the_segment_and_right_frames_show_it(seed, known, right):
    settings = EvidenceSettings(8, mix=1.0, right=right, seed=seed)
    plan = plan_of(question(segment=(4.0, 6.0) if known else None), settings)
    assert plan.manipulation == "localized"
    start, end = plan.segment
    manipulated = TIMES[list(plan.manipulated_indices)]
    assert len(manipulated) == len(plan.chosen_indices) == len(plan.frame_indices) == 8
    assert ((manipulated < start) | (manipulated > end)).all()
    chosen = TIMES[list(plan.chosen_indices)]
    assert ((chosen >= start) & (chosen <= end)).any()
    if known and right == "dense":
        assert ((chosen >= start) & (chosen <= end)).all() and plan.right == "dense"
    else:
        assert plan.chosen_indices == plan.frame_indices
        assert plan.right == ("right=whole" if known else "segment unknown")


@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_comprehensive_frames_are_a_repeated_sparse_subset(seed, subset):
    settings = EvidenceSettings(16, mix=0.0, subset=subset, seed=seed)
    plan = plan_of(question(), settings)
    assert plan.manipulation == "comprehensive" and plan.chosen_indices == plan.frame_indices
    assert plan.right is None
    distinct = set(plan.manipulated_indices)
    assert distinct < set(plan.frame_indices) and len(distinct) == max(1, round(16 * subset))
    assert len(plan.manipulated_indices) == 16
    assert list(plan.manipulated_indices) == sorted(plan.manipulated_indices)


def test_evidence_is_a_function_of_seed_and_names_and_follows_the_mix():
    settings = EvidenceSettings(8, mix=0.3, seed=7)
    plans = [plan_of(question(index=i), settings) for i in range(300)]
    again = [plan_of(question(index=i), settings) for i in range(300)]
    assert plans == again
    share = np.mean([plan.manipulation == "localized" for plan in plans])
    assert 0.2 < share < 0.4
    subsets = {p.manipulated_indices for p in plans if p.manipulation == "comprehensive"}
    assert len(subsets) == 1  # one per video: its questions share a prefill
    other = plan_of(question(), dataclasses.replace(settings, seed=8, mix=0.0))
    assert other.manipulated_indices not in subsets


@pytest.mark.parametrize("kind", pairs.KINDS_ABOUT_TIME)
def test_a_question_about_time_keeps_the_whole_video(kind):
    turn = dataclasses.replace(MOVE, kind=kind)
    plan = plan_of(question(turn), EvidenceSettings(8, mix=1.0))
    assert plan.chosen_indices == plan.frame_indices and plan.segment == (4.0, 6.0)
    assert plan.right == "question about time"


def test_dense_frames_are_used_only_where_they_show_more():
    settings = EvidenceSettings(16, mix=1.0)
    fine = plan_of(question(), settings)
    assert fine.chosen_indices != fine.frame_indices and fine.right == "dense"
    coarse = plan_of(question(), settings, TIMES[::4])  # 1 frame a second, 16 shown
    assert coarse.chosen_indices == coarse.frame_indices and coarse.manipulation == "localized"
    assert coarse.right == "no more frames stored"


@pytest.mark.parametrize("times", [[0.0], [0.0, 5.0]])
def test_a_video_without_remainder_gives_a_comprehensive_pair(times):
    plan = plan_of(question(segment=(0.0, 5.0)), EvidenceSettings(8, mix=1.0), times)
    assert plan.manipulation == "comprehensive"
    assert len(plan.manipulated_indices) == len(plan.frame_indices) == len(times)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True), st.integers(1, 40))
def test_repeat_to_spreads_evenly(indices, count):
    repeated = pairs.repeat_to(np.array(sorted(indices)), count)
    assert len(repeated) == count and (np.diff(repeated) >= 0).all()
    if count >= len(indices):
        shares = np.unique(repeated, return_counts=True)[1]
        assert len(shares) == len(indices) and shares.max() - shares.min() <= 1


@pytest.mark.parametrize("turn, expected", [
    (MOVE, (4.0, 6.0)),  # question and answer together name the event
    (Turn("Which way does the red circle move?", "right"), None),
    (Turn("How many times does the blue square blink?", "two"), (2.0, 9.0)),  # joined windows
    (Turn("What happens in the video?", "the green star grows"), None),  # window over most of it
    (Turn("What is it?", "a star"), None),
])
def test_segment_comes_from_matching_temporal_examples(turn, expected):
    examples = [temporal("the red circle moves left", [[4.0, 6.0]]),
                temporal("the blue square blinks", [[2.0, 3.0], [8.0, 9.0]]),
                temporal("the green star grows", [[1.0, 15.0]])]
    talk = conversation("video0", [turn], end=16.0)
    assert pairs.evidence_segment(talk, turn, [talk, *examples], 16.0) == expected


def test_segment_of_an_example_about_a_part_of_the_video():
    talk = conversation("video0", [MOVE], start=3.0, end=5.0)
    assert pairs.evidence_segment(talk, MOVE, [talk], 16.0) == (3.0, 5.0)


def test_questions_leave_head_calls_out_and_are_limited_reproducibly():
    turns = [dataclasses.replace(MOVE, question=f"Question {i}?") for i in range(20)]
    call = Turn("Where?", "It is at <region>.")
    dataset = MemoryDataset(1, {"video0": [conversation("video0", [*turns, call])]})
    everything = pairs.questions_of(dataset, "video0", 100, 0)
    assert [q.index for q in everything] == list(range(20))
    some = pairs.questions_of(dataset, "video0", 5, 0)
    assert len(some) == 5 and some == pairs.questions_of(dataset, "video0", 5, 0)
    assert {q.index for q in some} != {q.index for q in pairs.questions_of(dataset, "video0", 5, 1)}
    shown = [" Options: left; right; up; down." in q.asked for q in everything]
    assert 3 < sum(shown) < 17


def test_a_question_that_is_there_with_and_without_options_is_not_asked_twice():
    turns = [MOVE, dataclasses.replace(MOVE, options=())]
    asked = set()
    for seed in range(8):
        dataset = MemoryDataset(1, {"video0": [conversation("video0", turns)]})
        questions = [q.asked for q in pairs.questions_of(dataset, "video0", 9, seed)]
        assert len(questions) == len(set(questions))
        asked.add(len(questions))
    assert asked == {1, 2}


@pytest.mark.parametrize("stored, frames", [(3, 4), (4, 4), (5, 8), (16, 16), (64, 16)])
def test_a_video_is_shown_in_the_smallest_number_that_takes_its_frames(stored, frames):
    settings = EvidenceSettings(16, mix=0.5, fewer=(8, 4))
    assert settings.frames_of(stored) == frames
    plan = plan_of(question(segment=(0.0, 0.5)), settings, TIMES[:stored])
    for indices in (plan.frame_indices, plan.chosen_indices, plan.manipulated_indices):
        assert len(indices) == min(stored, frames)  # each side as many, none of the whole twice
    assert plan.frame_indices == tuple(range(stored)) or stored > frames


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_where_a_sampler_gives_fewer_frames_every_side_has_as_many(mix):
    """16 s at 4 frames a second: one a second are 16 of the 32 that were asked for."""
    settings = EvidenceSettings(32, mix=mix, sampling="frames_at_one_fps")
    plan = plan_of(question(), settings)
    assert plan.frame_indices == tuple(range(0, 64, 4))
    assert len(plan.chosen_indices) == len(plan.manipulated_indices) == 16
    if mix:
        assert set(TIMES[list(plan.chosen_indices)]) == set(np.arange(4.0, 6.25, 0.25))
    else:
        assert set(plan.manipulated_indices) < set(plan.frame_indices)


@pytest.mark.parametrize("field, value", [
    ("frames", 0), ("fewer", (8,)), ("mix", 1.5), ("subset", 0.0), ("subset", 1.0),
    ("right", "left")])
def test_bad_evidence_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        EvidenceSettings(**{"frames": 8, field: value})


# --- filters ---


@pytest.mark.parametrize("changes, reason", [
    ({}, None),
    ({"finished": (False, True)}, "truncated"),
    ({"finished": (True, False)}, "truncated"),
    ({"chosen": " . "}, "empty"),
    ({"rejected": ""}, "empty"),
    ({"rejected": "The LEFT."}, "identical"),
    ({"rejected": "it is <region>"}, "head call"),
    ({"rejected": "I'm sorry, I can't tell."}, "refusal"),
    ({"chosen": "There is no information about it."}, "refusal"),
    ({"rejected": "As an AI model, I see no video."}, "refusal"),
    ({"lengths": (2, 9)}, "length ratio"),
    ({"gap": 0.0}, "likelihood gap"),
    ({"gap": -3.0}, "likelihood gap"),
    ({"chosen": "up"}, "judge: preferred answer is wrong"),
])
def test_each_filter_names_its_reason(changes, reason):
    dropped = candidate(**changes)
    assert (pairs.cheap_reason(dropped, FilterSettings())
            or pairs.judge_by_rules(dropped)) == reason


@pytest.mark.parametrize("text", [
    "I see a red circle", "someone is sorry", "there is no circle", "no",
    "the circle is not moving"])
def test_answers_are_no_refusals(text):
    assert not pairs.is_refusal(text)


def test_near_equal_answers_are_dropped():
    long = "the red circle moves left then the blue square blinks and the star grows twice"
    near = long.replace("twice", "thrice")
    turn = Turn("What happens in the video?", long, (), "caption")
    pair = candidate(long, near, turn, lengths=(15, 15))
    assert pairs.cheap_reason(pair, FilterSettings(near_equal=0.9)) == "near-equal"
    assert pairs.cheap_reason(pair, FilterSettings(near_equal=1.0)) != "near-equal"


def test_judge_scores_captions_by_words_and_leaves_doubtful_ones_out():
    known = "the red circle moves left, then the blue square blinks"
    turn = Turn("What happens in the video?", known, (), "caption")
    half = "the red circle moves left, then the green star grows"
    close = "the red circle moves left, then the blue square grows"
    assert pairs.judge_by_rules(candidate(known, half, turn)) is None
    assert pairs.judge_by_rules(candidate(known, close, turn)) == (
        "judge: dis-preferred answer is right")
    assert pairs.judge_by_rules(candidate(close, half, turn)) == "judge: preferred answer is wrong"


def test_gap_is_right_minus_manipulated():
    assert candidate(gap=2.5).gap == pytest.approx(2.5)


def test_pair_is_an_example_with_all_frames_and_survives_json():
    pair = candidate()
    example = pairs.to_example(pair, 16.0, {"temperature": 0.7, "seed": 3})
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example
    targets = example.targets
    assert (targets["chosen"], targets["rejected"]) == ("left", "right")
    for name in ("frame_indices", "chosen_indices", "manipulated_indices"):
        assert targets[name] == list(getattr(pair.evidence, name))
    assert targets["seed"] == 3 and example.turns[0].question == pair.question.asked
    assert targets["chosen_logp"] - targets["chosen_logp_manipulated"] == pytest.approx(pair.gap)
    assert "train_frames" not in targets


def test_training_may_show_the_frames_of_the_preferred_answer():
    pair = candidate()
    pair = dataclasses.replace(pair, evidence=plan_of(question(), EvidenceSettings(8, mix=1.0)))
    targets = pairs.to_example(pair, 16.0, {}, "segment").targets
    assert targets["frame_indices"] == targets["chosen_indices"] != list(
        pair.evidence.frame_indices)
    assert targets["train_frames"] == "segment" and len(targets["manipulated_indices"]) == 8
