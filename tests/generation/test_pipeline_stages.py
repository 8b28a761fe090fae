"""Stages of the pair pipeline with plug-ins that cost nothing: what is kept, and after any kill."""

import collections
import contextlib
import dataclasses
import json
import runpy
import tempfile
import types

import memory_bucket
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_model import MemoryDataset, conversation

from tpo_jax import preferences
from tpo_jax.data import files
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Example, Turn, VideoInfo
from tpo_jax.data.row_plans import RowPlan
from tpo_jax.data.sampling import SAMPLERS
from tpo_jax.data.text import TextCodec
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings
from tpo_jax.generation.pipeline import command, manifest, plugins, prompts
from tpo_jax.generation.pipeline import model as pipeline_model
from tpo_jax.generation.pipeline.manifest import Folder, FolderBusy, Manifest, ManifestError
from tpo_jax.generation.pipeline.shards import Work, run_part, run_whole
from tpo_jax.generation.pipeline.stages import FILES, KEYS, Pipeline, report

VIDEOS = [f"video{i}" for i in range(4)]
OPTIONS = {stage: {"option": stage} for stage in FILES}


class Killed(Exception):
    pass


class Speaker:
    """Replies that are functions of the request; counts what it is asked."""

    temperature = 0.25

    def __init__(self):
        self.asked = collections.Counter()

    def say(self, requests, done):
        for request in requests:
            if request.id in done:
                continue
            self.asked[request.id] += 1
            yield request.id, plugins.Reply(self.reply(request))

    def reply(self, request):
        number = pairs.name_id(request.id)
        if request.text == prompts.CAPTION:
            assert request.needs_pictures and len(request.frame_indices) == 2
            return f"scene {number % 7} " if number % 5 else ""
        assert not request.needs_pictures
        if request.text.endswith("else no"):
            return f"better={1 + number % 2}\ncorrect=both\nunclear=no"
        return f"Question: what of {number}?\nAnswer: a thing" if number % 6 else "None."


class Answerer:
    """Answers of numbers; of some questions those of both sides are the same."""

    weights = "none"

    def __init__(self, speaker):
        self.asked = speaker.asked
        self.settings = Settings(pairs.EvidenceSettings(4), pairs.FilterSettings(), 8,
                                 questions=5, samples=2)

    def answers(self, job, side, same):
        self.asked[f"{side} {job['id']}"] += 1
        number = pairs.name_id(job["id"]) % 3
        words = [f"{side if number else same} number {number} {s}" for s in range(2)]
        return [{"text": text, "tokens": [1, 2], "finished": True, "logp": -1.5} for text in words]

    def preferred(self, jobs, done):
        for job in jobs:
            if job["id"] not in done:
                yield job["id"], {"answers": self.answers(job, "right", "same"),
                                  "chosen_logp": [-1.25, -1.25]}

    def dispreferred(self, jobs, done):
        for job in jobs:
            if job["id"] not in done:
                yield job["id"], {"answers": self.answers(job, "wrong", "same"),
                                  "chosen_logp": [-2.5, -2.5]}


def pipeline_of(folder, speaker, mix=0.5):
    return Pipeline(folder, MemoryDataset(len(VIDEOS)), plugins.SpokenCaptioner(speaker),
                    plugins.SpokenWriter(speaker, 5, mix, 0), plugins.SpokenJudge(speaker, 0),
                    Answerer(speaker), parts=3, caption_frames=2)


def run(path, speaker, wanted=1000, options=OPTIONS, mix=0.5):
    work = Work(epath.Path(path), VIDEOS, 2, options)
    with work.whole() as folder:
        found = work.elsewhere(folder, range(2))
        run_whole(work, folder, found, pipeline_of(folder, speaker, mix), wanted)
        return report(folder, wanted)


def run_shard(path, speaker, shard, shards, wanted=1000, size=1):
    """One of several commands; the chunks that are missing after it."""
    work = Work(epath.Path(path), VIDEOS, size, OPTIONS)
    with work.part(shard, shards) as folder:
        numbers = range(shard, len(work), shards)
        run_part(work, folder, work.elsewhere(folder, numbers), pipeline_of(folder, speaker),
                 wanted, numbers)
    return work.missing(wanted)


def manifests(path):
    return {name: (epath.Path(path) / name).read_bytes() for name in FILES.values()}


@pytest.fixture(scope="module", autouse=True)
def no_disk():
    """A killed process loses nothing that it wrote; waiting for the disk takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    speaker = Speaker()
    counts = run(path, speaker)
    return path, counts, speaker.asked


def read(path, stage):
    return [json.loads(line) for line in (path / FILES[stage]).read_text().splitlines()]


def test_every_record_says_what_it_was_drawn_with(whole):
    path, _, _ = whole
    for stage in FILES:
        records = read(path, stage)
        assert records
        for record in records:
            where = record["targets"] if stage == "pairs" else record
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


@settings(max_examples=60, deadline=None)
@given(kills=st.lists(st.integers(1, 150), min_size=1, max_size=3), cut=st.integers(0, 300))
def test_killed_anywhere_it_goes_on_bit_identically_and_redoes_nothing(whole, kills, cut):
    """Killed after so many records, the last line cut by so many bytes at the last kill."""
    path, _, asked = whole
    speaker, real = Speaker(), Manifest.append
    lost = 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for number, kill in enumerate(kills):
            left = [kill]

            def append(self, record, left=left):
                real(self, record)
                left[0] -= 1
                if not left[0]:
                    raise Killed(self.path)

            patch.setattr(Manifest, "append", append)
            try:
                run(folder, speaker)
            except Killed as killed:
                if number == len(kills) - 1 and cut:
                    file = killed.args[0]
                    data = file.read_bytes()
                    size = len(data.splitlines(keepends=True)[-1])
                    file.write_bytes(data[: len(data) - min(cut, size)])
                    lost = 1
        patch.setattr(Manifest, "append", real)
        run(folder, speaker)
        assert manifests(folder) == manifests(path)
    again = speaker.asked - asked
    assert again.total() <= lost and speaker.asked.keys() == asked.keys()


@pytest.mark.parametrize("told", [True, False])
def test_in_a_bucket_only_a_kill_without_a_word_loses_records(whole, monkeypatch, told):
    """SIGTERM has them written before the end; SIGKILL loses those since the last rewrite."""
    path, counts, asked = whole
    memory_bucket.install(monkeypatch)
    monkeypatch.setattr(files, "SECONDS_BETWEEN_REWRITES", 1e9)  # only where a stage is done
    real, speaker, left = Manifest.append, Speaker(), [90]

    def append(self, record):
        real(self, record)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "append", append)
        if not told:
            patch.setattr(files.Lines, "close", lambda self: None)
        with pytest.raises(Killed):
            run("gs://bucket/pairs", speaker)
    there = sum(data.count(b"\n") for name, data in manifests("gs://bucket/pairs").items())
    assert there == 90 if told else 60 < there < 90
    assert run("gs://bucket/pairs", speaker) == counts
    assert manifests("gs://bucket/pairs") == manifests(path)
    again = speaker.asked - asked
    assert 0 <= again.total() <= 90 - there and bool(again) != told
    names = {file.name for file in epath.Path("gs://bucket/pairs").iterdir()}
    assert names == {"settings.json", *FILES.values()}


def test_a_finished_run_asks_nothing_and_more_pairs_go_on(whole, tmp_path):
    path, counts, _ = whole
    few = run(tmp_path, Speaker(), wanted=1)
    assert few["written"] == 1 and few["videos"] == 2
    again = Speaker()
    assert run(tmp_path, again, wanted=1) == few and not again.asked
    assert run(tmp_path, again) == counts
    assert manifests(tmp_path) == manifests(path)
    assert not any("video0" in name or "video1" in name for name in again.asked)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(3)), kills=st.lists(st.integers(1, 80), max_size=2))
def test_shards_in_any_order_and_killed_anywhere_make_the_manifests_of_one_command(
        whole, order, kills):
    path, counts, asked = whole
    speaker, real = Speaker(), Manifest.append
    with tempfile.TemporaryDirectory() as folder:
        for kill in kills:
            left = [kill]

            def append(self, record, left=left):
                real(self, record)
                left[0] -= 1
                if not left[0]:
                    raise Killed

            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                patch.setattr(Manifest, "append", append)
                run_shard(folder, speaker, order[0], 3, size=2)
        left_over = [run_shard(folder, speaker, shard, 3, size=2) for shard in order]
        assert left_over[0] and left_over[2] == []
        assert run(folder, speaker) == counts
        assert manifests(folder) == manifests(path)
    assert speaker.asked == asked


def test_what_one_command_left_is_gone_on_with_by_shards_and_by_one_again(whole, tmp_path):
    path, counts, asked = whole
    speaker = Speaker()
    assert run(tmp_path, speaker, wanted=1)["videos"] == 2  # the first of two chunks
    assert run_shard(tmp_path, speaker, 0, 2, size=2) == [1] and speaker.asked < asked
    before = speaker.asked.copy()
    assert run_shard(tmp_path, speaker, 1, 4, size=2) == []
    assert not any("video0" in name or "video1" in name for name in speaker.asked - before)
    assert run(tmp_path, speaker) == counts and speaker.asked == asked
    assert manifests(tmp_path) == manifests(path)


def test_a_shard_stops_where_those_before_have_enough(tmp_path):
    first, second = Speaker(), Speaker()
    assert run_shard(tmp_path, first, 0, 2, wanted=1) == []  # the chunks are videos
    assert run_shard(tmp_path, second, 1, 2, wanted=1) == [] and not second.asked
    assert not any("video2" in name for name in first.asked)


def test_shards_with_other_options_are_refused(tmp_path):
    run_shard(tmp_path, Speaker(), 0, 2)
    with pytest.raises(ManifestError, match="(?s)0-of-2: .*captions: option: there 'captions', "
                       "now 'x'.*remove captions.jsonl, .*chunks.jsonl"):
        run(tmp_path, Speaker(), options=OPTIONS | {"captions": {"option": "x"}})


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


def test_a_number_of_frames_is_a_program_and_prompts_have_one_length(monkeypatch):
    made = []

    class Generator:
        def __init__(self, model, params, codec, dataset, settings, prompt, poll, mesh):
            made.append((settings.evidence.frames, settings.evidence.fewer, prompt))

        def answers(self, questions, evidence, side, skip):
            assert max(len(e.chosen_indices) for e in evidence) <= settings.evidence.frames
            for number in range(len(questions)):
                rows, text = [types.SimpleNamespace(questions=[number])], questions[number].asked
                drawn = {(number, 0): (pairs.Answer(text, 1, True, 0.0), [7])}
                yield rows, drawn, lambda sample, answers, rows: dict.fromkeys(answers, -2.0)

    monkeypatch.setattr(pipeline_model, "AnswerGenerator", Generator)
    own = pipeline_model.OwnModel(None, None, None, None, "none")
    settings = Settings(pairs.EvidenceSettings(8, fewer=(4,)), pairs.FilterSettings(), 6, samples=1)
    answerer = pipeline_model.ModelAnswerer(own, settings, prompt=21)
    jobs = [{"id": f"v{i}/talk/0", "video_id": f"v{i}", "source": "test", "question": f"q{i}",
             "asked": f"q{i}", "answer": "a", "options": [], "kind": "", "frame_indices": [0] * n}
            for i, n in enumerate((8, 3, 8, 5))]  # of 5 frames three are padding
    found = [(name, fields["answers"][0]["text"], *fields["chosen_logp"])
             for _ in range(2) for name, fields in answerer.preferred(jobs, ())]
    assert found == [(f"v{n}/talk/0", f"q{n}", -2.0) for n in (1, 0, 2, 3)] * 2
    assert made == [(4, (), 21), (8, (), 21)]


def copied(whole, tmp_path):
    run(tmp_path, Speaker(), wanted=1)
    return tmp_path


def test_a_changed_option_of_an_earlier_stage_is_refused_by_name(whole, tmp_path):
    copied(whole, tmp_path)
    changed = OPTIONS | {"questions": {"option": "other"}}
    with pytest.raises(ManifestError, match="(?s)questions: option: there 'questions', now 'other'"
                       ".*remove questions.jsonl, preferred.jsonl, .*pairs.jsonl"):
        run(tmp_path, Speaker(), options=changed)
    for name in ("preferred", "dispreferred", "filter", "pairs"):
        (tmp_path / FILES[name]).unlink()
    with pytest.raises(ManifestError):  # its own records are still there
        run(tmp_path, Speaker(), options=changed)
    (tmp_path / FILES["questions"]).unlink()
    speaker = Speaker()
    run(tmp_path, speaker, wanted=1, options=changed)
    assert speaker.asked and not any("/part" in name for name in speaker.asked)  # captions stay


def test_a_later_option_may_change_before_its_stage_has_begun(whole, tmp_path):
    copied(whole, tmp_path)
    for name in ("filter", "pairs"):
        (tmp_path / FILES[name]).unlink()
    speaker = Speaker()
    run(tmp_path, speaker, wanted=1, options=OPTIONS | {"filter": {"option": "other"}})
    assert all(name.endswith("/judge") for name in speaker.asked)


def test_records_made_from_other_records_are_refused(whole, tmp_path):
    copied(whole, tmp_path)
    captions = tmp_path / FILES["captions"]
    text = captions.read_text()
    captions.write_text(text.replace("scene", "scenery"))
    with pytest.raises(ManifestError, match="questions.jsonl: 'video0/written0/0' was made from"):
        run(tmp_path, Speaker())


@pytest.mark.parametrize("text, message", [
    ('{"id": "a"}\nnonsense\n', "m.jsonl:2: not a record with 'id'"),
    ('{"id": "a"}\n{"name": "b"}\n', "m.jsonl:2: not a record with 'id'"),
    ('{"id": "a"}\n{"id": "a"}\n', "m.jsonl:2: id 'a' occurs twice"),
])
def test_a_damaged_manifest_names_the_line(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ManifestError, match=message):
        Manifest(tmp_path / "m.jsonl")


def test_another_process_holds_the_same_records_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest.jax, "process_index", lambda: 1)
    monkeypatch.setattr(manifest, "of_process_0", lambda mine: b'{"id": "a"}\n{"id": "b')
    (tmp_path / "m.jsonl").write_text('{"id": "late"}\n')  # what it sees itself does not matter
    other = Manifest(tmp_path / "m.jsonl")
    other.append({"id": "c"})
    other.sync()
    other.close()
    assert list(other.records) == ["a", "c"]
    assert (tmp_path / "m.jsonl").read_text() == '{"id": "late"}\n'


def test_two_commands_cannot_write_one_folder(tmp_path):
    with Folder(tmp_path, FILES, OPTIONS, KEYS):
        with pytest.raises(FolderBusy, match="another command is writing here"):
            with Folder(tmp_path, FILES, OPTIONS, KEYS):
                pass
    with Folder(tmp_path, FILES, OPTIONS, KEYS):
        pass


def test_a_folder_that_cannot_serve_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"data": "x"}')
    with pytest.raises(ManifestError, match="of another version of `generate`"):
        run(tmp_path, Speaker())


# --- prompts and their replies ---


@pytest.mark.parametrize("reply, expected", [
    ("Question: Who runs?\nAnswer: The dog.", ("Who runs?", "The dog.")),
    ("**Question:** Who\nruns?\n\n**Answer:** The dog.\n", ("Who runs?", "The dog.")),
    ("None", "topic does not suit"), ("none.", "topic does not suit"),
    ("Who runs?", "unreadable reply"), ("Question: Who?", "unreadable reply"),
    ("Question: Where is <box>?\nAnswer: Here.", "holds '<'"),
])
def test_replies_of_a_writer(reply, expected):
    assert prompts.read_question(reply) == expected


@pytest.mark.parametrize("reply, reason", [
    ("better=2\ncorrect=2\nunclear=no", None),
    ("Better = 2, correct: = both\nunclear=No", None),
    ("better=1\ncorrect=2\nunclear=no", "judge: dis-preferred answer is as good or better"),
    ("better=same\ncorrect=both\nunclear=no", "judge: dis-preferred answer is as good or better"),
    ("better=2\ncorrect=1\nunclear=no", "judge: preferred answer is wrong"),
    ("better=2\ncorrect=none\nunclear=no", "judge: preferred answer is wrong"),
    ("better=2\ncorrect=2\nunclear=yes", "judge: unclear question"),
    ("better=2\ncorrect=2", "judge: unreadable reply"),
    ("", "judge: unreadable reply"),
])
def test_verdicts(reply, reason):
    assert prompts.read_verdict(reply, "2")[1] == reason


def test_the_order_of_answers_is_drawn_and_told_to_the_reader(whole):
    path, _, _ = whole
    places = collections.Counter(
        r["verdict"]["chosen"] for r in read(path, "filter") if "verdict" in r)
    assert set(places) == {"1", "2"}


def test_rules_caption_parts_with_what_the_split_says_of_them():
    def caption(text, start, end, name):
        return conversation("video0", [Turn("What happens?", text, (), "caption")], start, end,
                            name)

    dataset = MemoryDataset(1, {"video0": [
        caption("it moves left", 0.0, 3.0, "a"), caption("it moves left, then right", 0.0, 12.0,
                                                          "b")]})
    jobs = [{"id": str(i), "video_id": "video0", "segment": [4.0 * i, 4.0 * i + 4]}
            for i in range(2)]
    found = dict(plugins.RuleCaptioner(dataset).caption(jobs, ()))
    assert found == {"0": {"caption": "it moves left"},
                     "1": {"caption": "it moves left, then right"}}
    empty = dict(plugins.RuleCaptioner(MemoryDataset(1)).caption(jobs[:1], ()))
    assert "no caption" in empty["0"]["failed"]
