"""Stages of the pair pipeline: what is asked, what is kept, and what every record says."""

import collections
import dataclasses
import runpy
import types

import numpy as np
import pytest
from etils import epath
from fake_pipeline import OPTIONS, VIDEOS, Answerer, Speaker, manifests, pipeline_of, read, run
from micro_model import MemoryDataset

from tpo_jax import preferences
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Example, VideoInfo
from tpo_jax.data.row_plans import RowPlan
from tpo_jax.data.sampling import SAMPLERS
from tpo_jax.data.text import TextCodec
from tpo_jax.generation import pairs
from tpo_jax.generation.pipeline import command, prompts
from tpo_jax.generation.pipeline.shards import Work
from tpo_jax.generation.pipeline.stages import FILES


def test_every_record_says_what_it_was_drawn_with(whole):
    path, _, _ = whole
    for stage in FILES:
        records = read(path, stage)
        assert records
        for record in records:
            where = record["targets"] if stage == "pairs" else record
            named = {"example_id"} if stage == "pairs" else {"id", "input"}
            assert record.keys() & {"example_id", "id", "input"} == named
            assert len(where["frame_indices"]) == (2 if stage == "captions" else 4)
            assert where["seed"] == 0
            expected = {"videos": None, "captions": 0.25, "questions": 0.25, "filter": 0.25}
            assert where["temperature"] == expected.get(stage, 0.7)


@pytest.mark.parametrize("name", ["longva_tpo", "llava_video_tpo"])
def test_the_published_configs_report_the_kinds_that_are_written(name):
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    assert list(config.preference.kinds) == list(prompts.KINDS) == [
        "temporal", "action", "causal", "information_extraction", "descriptive", "summarization",
        "object", "spatial"]


def test_questions_are_of_the_kinds_and_a_localized_one_excludes_its_part(whole):
    path, _, _ = whole
    questions = [q for q in read(path, "questions") if "failed" not in q]
    assert {q["kind"] for q in questions} <= set(prompts.KINDS)
    assert {q["manipulation"] for q in questions} == {"localized", "comprehensive"}
    times = np.arange(24) / 2
    for question in questions:
        if question["manipulation"] == "localized":
            start, end = question["segment"]
            assert end - start == 4.0 and (start, end) != (0.0, 12.0)
            shown = times[question["manipulated_indices"]]
            assert ((shown < start) | (shown > end)).all()
            right = times[question["chosen_indices"]]
            assert ((right >= start) & (right <= end)).all()
        else:
            assert set(question["manipulated_indices"]) < set(question["chosen_indices"])
    rights = {r["id"]: r["frame_indices"] for r in read(path, "preferred")}
    assert rights == {q["id"]: q["chosen_indices"] for q in questions}


@pytest.mark.parametrize("mix, only", [(0.0, "comprehensive"), (1.0, "localized")])
def test_any_mix(tmp_path, mix, only):
    run(tmp_path, Speaker(), mix=mix)
    found = {q.get("manipulation") for q in read(tmp_path, "questions")}
    assert found - {None} == {only}


def test_counts_add_up_and_cheap_filters_come_before_the_judge(whole):
    path, counts, asked = whole
    assert counts["generated"] == sum(counts["dropped"].values()) + counts["kept"]
    assert counts["kept"] == counts["written"] > 3
    assert counts["questions"]["failed"] == {"topic does not suit": sum(
        "failed" in q for q in read(path, "questions"))}
    assert counts["captions"]["failed"].keys() == {"empty reply"}
    assert counts["manipulation"].keys() == {"localized", "comprehensive"}
    dropped = counts["dropped"]
    assert dropped.keys() == {"identical", "question has a pair already",
                              "judge: dis-preferred answer is as good or better"}
    judged = sum(name.endswith("/judge") for name in asked)
    assert judged == counts["kept"] + dropped["judge: dis-preferred answer is as good or better"]
    for pair in map(Example.from_json, read(path, "pairs")):
        assert pair.targets["chosen"].startswith("right")
        assert pair.targets["rejected"].startswith("wrong")
        assert pair.targets["chosen_logp"] == -1.25  # scored, as the other, and not as it was drawn
        assert pair.targets["chosen_logp_manipulated"] == -2.5
    assert {record["gap"] for record in read(path, "filter")} == {1.25}


def test_the_order_of_answers_is_drawn_and_told_to_the_reader(whole):
    path, _, _ = whole
    places = collections.Counter(
        r["verdict"]["chosen"] for r in read(path, "filter") if "verdict" in r)
    assert set(places) == {"1", "2"}


def test_a_video_is_shown_in_the_fewest_frames_that_take_all_of_its_own(tmp_path):
    answerer = Answerer(Speaker())
    answerer.settings = dataclasses.replace(
        answerer.settings, evidence=pairs.EvidenceSettings(32, fewer=(16, 24)))  # it has 24
    with Work(epath.Path(tmp_path), VIDEOS, 2, OPTIONS).whole() as folder:
        pipeline = dataclasses.replace(pipeline_of(folder, Speaker()), answerer=answerer)
        assert pipeline.run(VIDEOS[:1], 99) > 0
    shown = [r for stage in ("videos", "preferred", "dispreferred") for r in read(tmp_path, stage)]
    assert {len(r["frame_indices"]) for r in shown} == {24}


CLIPS = {  # video -> times of its stored frames, and its duration, in seconds
    "video0": (np.arange(24) / 2, 12.0),
    "video1": (np.arange(12) / 2, 6.0),  # one a second are fewer than asked for
    "video2": (np.array([0.0, 0.48, 1.0, 1.48, 2.0]), 2.5),  # fewer are stored
    "video3": (0.1 + 0.51 * np.arange(20), 10.7),
}


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_pairs_show_what_training_rows_show_of_the_same_clip(tmp_path, codec, model, sampling):
    """From the template of the model to the records of every stage."""
    infos = {name: VideoInfo("video", duration, len(times), times.astype(np.float32), 32, 32)
             for name, (times, duration) in CLIPS.items()}
    dataset = MemoryDataset(len(CLIPS))
    dataset.video_info = infos.__getitem__
    codec = TextCodec(codec.tokenizer, dataclasses.replace(codec.template, sampling=sampling))
    own = types.SimpleNamespace(codec=codec, model=model)
    flags = preferences.parse(["generate", "--model=m", "--data=d", "--out=o", "--frames=8"])
    answerer = Answerer(Speaker())
    answerer.settings = command.settings_of(flags, own, None)
    with Work(epath.Path(tmp_path), VIDEOS, 2, OPTIONS).whole() as folder:
        pipeline = dataclasses.replace(
            pipeline_of(folder, Speaker()), answerer=answerer, dataset=dataset)
        assert pipeline.run(VIDEOS, 99) > 3
    rows = row_builder(codec, model.config, Bucket(
        "video", "video", batch_size=1, frames=8, branches=1, branch_tokens=8, answers=1,
        windows=1, mask_size=model.config.mask_size))
    shown = {name: rows.frame_indices(RowPlan(dataset, name, 0.0, info.duration, ())).tolist()
             for name, info in infos.items()}
    assert len(shown["video1"]) == (6 if sampling == "frames_at_one_fps" else 8)
    for stage in ("videos", "questions", "filter", "pairs"):
        for record in read(tmp_path, stage):
            where = record["targets"] if stage == "pairs" else record
            assert where["frame_indices"] == shown[record["video_id"]]
            for side in ("chosen_indices", "manipulated_indices"):
                assert len(where.get(side, where["frame_indices"])) == len(where["frame_indices"])
    options = command.stage_options(flags, answerer.settings, "none")["videos"]
    # The manifests depend on it; those from before there were several go on.
    assert options.get("sampling", "uniform") == sampling
    assert ("sampling" in options) == (sampling != "uniform")


def test_frames_of_training_change_the_pairs_alone(whole, tmp_path):
    path, _, _ = whole
    answerer = Answerer(Speaker())
    answerer.settings = dataclasses.replace(answerer.settings, train_frames="segment")
    with Work(epath.Path(tmp_path), VIDEOS, 2, OPTIONS).whole() as folder:
        pipeline = dataclasses.replace(pipeline_of(folder, Speaker()), answerer=answerer)
        for first in (0, 2):
            pipeline.run(VIDEOS[first : first + 2], 1000)
    before, after = manifests(path), manifests(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {FILES["pairs"]}
    differ = 0
    for old, new in zip(read(path, "pairs"), read(tmp_path, "pairs"), strict=True):
        targets = old["targets"]
        assert new["targets"] == targets | {
            "frame_indices": targets["chosen_indices"], "train_frames": "segment"}
        differ += targets["chosen_indices"] != targets["frame_indices"]
    assert differ
    flags = preferences.parse(["generate", "--model=m", "--data=d", "--out=o"])
    for of, option in ((Answerer(Speaker()).settings, {}),
                       (answerer.settings, {"train_frames": "segment"})):
        assert command.stage_options(flags, of, "none")["pairs"] == option


def test_nucleus_of_a_model_as_plug_in_is_an_option_of_its_records():
    """A greedy one draws nothing; folders from before it was an option go on."""

    def options(*more):
        flags = preferences.parse(["generate", "--model=m", "--data=d", "--out=o",
                                   "--captioner=model", "--writer=model", *more])
        settings = dataclasses.replace(Answerer(Speaker()).settings, top_p=flags.top_p)
        return command.stage_options(flags, settings, "none")

    def differ(*more):
        one, other = options("--top_p=0.9", *more), options("--top_p=0.8", *more)
        return [stage for stage in FILES if one[stage] != other[stage]]

    assert differ() == ["preferred"]
    assert differ("--plugin_temperature=0.7") == ["captions", "questions", "preferred"]
    assert differ("--plugin_temperature=0.7", "--judge=model") == [
        "captions", "questions", "preferred", "filter"]
    asked = ("--captioner=endpoint", "--writer=endpoint", "--judge=endpoint")
    assert differ("--plugin_temperature=0.7", *asked) == ["preferred"]  # it is not sent
