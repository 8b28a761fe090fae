import dataclasses
import json

import jax
import numpy as np
import pytest
from micro_model import MemoryDataset, conversation, that_says
from pycocotools import mask as coco_mask

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Turn
from tpo_jax.data.rows import BranchPlan, RowPlan, stack_rows
from tpo_jax.generation.routing import Router, _drawn_alike, inline
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys
from tpo_jax.generation.whole_video import Film
from tpo_jax.models.heads import HEADS, ClipInfo

QUESTION = "What does the red circle do?"


@pytest.fixture(scope="module")
def router(model, codec):
    return Router(model, codec)


@pytest.fixture(scope="module")
def routed(model, params, codec, router):
    """Answers "it <region> <temporal> <mask> it <region>" to two questions about two videos."""
    ids = codec.special_ids
    word, = codec.encode("it")[:1]
    # Every token may follow one other only, so the second <region> needs another way in: it is the
    # forced first token.
    said = [word, ids["<time_begin>"], ids["<temp>"], ids["<track_begin>"], ids["<tracking>"],
            codec.eos_id]
    speaking = that_says(params, codec, *said)
    # After the slot of the forced <box_begin> comes "it".
    table = speaking["language"]["lm_head"]["kernel"]
    speaking["task_tokens"]["region"][20] = 1.0
    table[20, word] = 1.0
    bucket = Bucket("prompts", "video", batch_size=3, frames=4, branches=2, branch_tokens=40,
                    answers=8, windows=1, mask_size=16)
    builder, dataset = row_builder(codec, model.config, bucket), MemoryDataset()
    rows = []
    for video in dataset.videos[:2]:
        example = conversation(video, [Turn("", "", (), "")])
        branches = (BranchPlan(example, 0, QUESTION, None),) * 2
        rows.append(builder.build(RowPlan(dataset, video, 0.0, 12.0, branches), 0))
    batch = stack_rows([*rows, builder.blank()])
    sampler = Sampler(model, codec, Sampling(max_new=12, events=3))
    context = sampler.prefill(speaking, batch)
    first = np.full((3, 2), -1, np.int32)
    first[0, 1] = ids["<box_begin>"]
    generation = sampler.generate(
        speaking, context, batch, branch_keys(0, np.zeros((3, 2), np.uint32)), first)
    clips = [ClipInfo(0.0, 12.0, batch["frame_times"][i], batch["frame_valid"][i], 32, 32)
             for i in range(2)]
    asked = np.array([[0, 2], [0, 0], [0, 0]], np.int32)[..., None]
    answers = router.route(speaking, context, batch, generation, clips, asked)
    return answers, speaking, context, batch, generation


def test_several_head_calls_are_served_in_order_and_inlined(routed):
    answers, *_ = routed
    assert [len(row) for row in answers] == [2, 2]
    plain, forced = answers[0]
    assert plain.marked == "it<temporal><mask>" and plain.finished
    assert [e.task for e in plain.events] == ["temporal", "mask"]
    assert [e.slot for e in plain.events] == [2, 4]
    assert forced.marked == "<region>it<temporal><mask>"
    assert [e.task for e in forced.events] == ["region", "temporal", "mask"]
    text = "".join(["it", *(inline(e.task, e.result) for e in plain.events)])
    assert plain.text == text and " s to " in text and "<" not in text


def test_results_equal_the_heads_run_on_the_slot_states(model, routed):
    answers, params, context, batch, generation = routed
    states = np.asarray(generation.event_states)
    first = np.arange(3)[:, None]
    embeds = model.bind(params).embed_branches(batch["branch_tokens"], {})
    prompt = {
        "prompt": generation.prompt_states[first, 1], "prompt_embeds": embeds[first, 1],
        "prompt_valid": generation.prompt_valid[first, 1],
    }  # fmt: skip
    for name, event, index in (("region", 0, 0), ("temporal", 1, 1), ("mask", 2, 2)):
        slot = np.zeros((3, 1, states.shape[-1]), np.float32)
        slot[0, 0] = states[0, 1, event]
        frame = np.full((3, 1), 2, np.int32)
        run = jax.jit(
            lambda *inputs, name=name: model.bind(params).run_head(name, *inputs, **prompt))
        predictions = jax.device_get(run(
            slot, context.encoded.features, batch["frames"], batch["frame_valid"], frame))
        one = {k: v[0, 0] for k, v in predictions.items()}
        clip = ClipInfo(0.0, 12.0, batch["frame_times"][0], batch["frame_valid"][0], 32, 32, 2)
        expected = HEADS[name].decode(one, clip)
        result = answers[0][1].events[index].result
        key = {"region": "box", "temporal": "windows", "mask": "presence"}[name]
        np.testing.assert_allclose(result[key], expected[key], atol=1e-4)
    # The frame that the question asks for reaches the head.
    assert answers[0][1].events[0].result["time"] == pytest.approx(batch["frame_times"][0][2])


def test_regions_of_one_answer_are_on_frames_of_their_own(router, routed, monkeypatch):
    """Three regions in an answer, two frames: the third is where the second is."""
    _, params, context, batch, generation = routed
    times = batch["frame_times"][0]
    clip = ClipInfo(0.0, 12.0, times, batch["frame_valid"][0], 32, 32)
    heads = np.array(generation.event_heads)
    heads[0, 1] = 0  # all are regions now
    several = dataclasses.replace(generation, event_heads=heads)
    asked = np.zeros((3, 2, 2), np.int32)
    asked[0, 1] = [3, 1]

    def run(params, features, frames, frame_valid, tokens, asked, name):
        """Boxes that tell which frame the head was given."""
        boxes = 0.1 * np.ones(4) * asked["frame"][..., None]
        return {"boxes": boxes} if name == "region" else unchanged(
            params, features, frames, frame_valid, tokens, asked, name=name)

    unchanged = router._run
    monkeypatch.setattr(router, "_run", run)
    answers = router.route(params, context, batch, several, [clip], asked)
    results = [event.result for event in answers[0][1].events]
    assert [result["time"] for result in results] == times[[3, 1, 1]].tolist()
    assert [result["box"][0] for result in results] == pytest.approx([0.3, 0.1, 0.1])


def test_json_form_has_rles_and_survives_json(routed):
    answer = routed[0][0][1]
    data = json.loads(json.dumps(answer.to_json()))
    assert set(data) == {"text", "marked", "finished", "events"}
    masks = data["events"][2]["result"]["masks"]
    for mask, rle in zip(answer.events[2].result["masks"], masks, strict=True):
        if rle is None:
            assert not mask.any()
        else:
            np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)


@dataclasses.dataclass(frozen=True)
class MemoryFilm(Film):
    """Frames of `MemoryDataset`: video 0, those at `at`."""

    at: tuple = ()

    def times(self, fps):
        return np.array(self.at)

    def play(self, times):
        return iter(MemoryDataset().frames("video0", (np.asarray(times) * 2).astype(int)))


def test_a_film_is_answered_frame_by_frame_in_place_of_the_shown_frames(router, routed):
    answers, params, context, batch, generation = routed
    clips = [ClipInfo(0.0, 12.0, batch["frame_times"][i], batch["frame_valid"][i], 32, 32)
             for i in range(2)]
    asked = np.array([[0, 2], [0, 0], [0, 0]], np.int32)[..., None]
    shown = batch["frame_times"][0]

    def route(times):
        film = MemoryFilm("video0", (32, 32), 0.0, 12.0, None, lambda x: x, tuple(times))
        return router.route(params, context, batch, generation, clips, asked, [film, None])

    # The shown frames alone: what the head says of them in any case.
    for branch, given in enumerate(route(shown.tolist())[0]):
        expected, found = answers[0][branch].events[-1].result, given.events[-1].result
        np.testing.assert_allclose(found["presence"], expected["presence"], atol=1e-5)
        np.testing.assert_allclose(found["times"], expected["times"])
        different = np.mean(np.stack(list(found["masks"])) != expected["masks"])
        assert different < 1e-3  # logits next to 0
    every = route(np.arange(24) / 2)
    result = every[0][0].events[-1].result
    assert result["times"] == (np.arange(24) / 2).tolist() and len(result["presence"]) == 24
    assert len(every[0][0].to_json()["events"][-1]["result"]["masks"]) == 24
    # The head calls of other tasks, and of rows without a film, are answered as ever.
    assert every[0][0].events[0] == answers[0][0].events[0]
    assert every[1][1].events[-1].result["times"] == answers[1][1].events[-1].result["times"]


@pytest.mark.parametrize("name, groups", [
    ("mask", [(0, [(0, 0, 0), (0, 2, 0)]), (0, [(0, 1, 0), (0, 1, 1)]), (0, [(0, 3, 0)]),
              (1, [(1, 1, 0)])]),
    ("sam2", [(0, [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 3, 0)]), (1, [(1, 1, 0)])]),
])
def test_calls_whose_boxes_are_on_the_same_frames_go_together(name, groups):
    """Question 0 has a box on frame 5, as question 2; question 1 on 1 and 5, question 3 none."""
    box = {"branch": np.array([[0, 1, 1, 2, 3], [1, 0, 0, 0, 0]]),
           "frame": np.array([[5, 5, 1, 5, 7], [5, 0, 0, 0, 0]]),
           "valid": np.array([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], bool)}  # fmt: skip
    places = [(1, 1, 0), (0, 3, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0)]
    assert list(_drawn_alike(name, places, box)) == groups


@pytest.mark.parametrize("task, result, words", [
    ("region", {"box_pixels": [3.6, 10.2, 20.0, 31.4]}, "[4,10,20,31]"),
    ("temporal", {"windows": [[4.0, 7.52, 0.9]]}, "4.0 s to 7.5 s"),
    ("temporal", {"windows": [[8.0, 9.0, 0.9], [1.0, 2.0, 0.8], [5.0, 6.0, 0.2]]},
     "1.0 s to 2.0 s and 8.0 s to 9.0 s"),
    ("mask", {"times": [0.0, 1.0, 2.0], "boxes": [None, [0, 0, 1, 1], [0, 0, 1, 1]]},
     "(visible from 1.0 s to 2.0 s)"),
    ("mask", {"times": [0.0, 1.0], "boxes": [None, None]}, "(not visible)"),
    ("mask", {"times": [0.0], "boxes": [[0.1, 0.2, 0.3, 0.4]]}, "(mask in [0.10,0.20,0.30,0.40])"),
    ("fourth", {"anything": 1}, "(fourth)"),
])
def test_results_in_words(task, result, words):
    assert inline(task, result) == words
