import collections
import json
import os
import re
import signal

import jax
import memory_bucket
import micro_model
import numpy as np
import pytest
from chat_server import serving
from etils import epath

from tpo_jax import preferences
from tpo_jax.data import pairs as pair_data
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.mixture import Source
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import Example, RecordError, Turn
from tpo_jax.data.rows import RowBuilder
from tpo_jax.generation.answers import AnswerGenerator
from tpo_jax.generation.pipeline import model as pipeline_model
from tpo_jax.generation.pipeline.manifest import Manifest
from tpo_jax.generation.pipeline.stages import FILES
from tpo_jax.generation.pipeline.stages import Pipeline as Stages
from tpo_jax.interop.folder import load_model, save_model
from tpo_jax.training import scoring, sidecar
from tpo_jax.training.preemption import EXIT_STATUS
from tpo_jax.training.step import make_score_step

VIDEOS = 4
GOLDEN = [
    ("video2/talk/0/pair", "left mo mo mot left left leftrighittit mo",
     "mo lefttvestitit"),
    ("video2/talk/1/pair", "mo mo leftitt",
     "t"),
]
BUCKET = Bucket("pairs", "video", batch_size=2, frames=8, branches=2, branch_tokens=24, answers=20,
                question=32, windows=1, mask_size=16)


def dataset(*_):
    turns = [Turn(f"What does the {colour} circle do?", "it moves left", (), "action")
             for colour in micro_model.COLOURS]
    return micro_model.MemoryDataset(
        VIDEOS, {f"video{i}": [micro_model.conversation(f"video{i}", turns)]
                 for i in range(VIDEOS)})


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    monkeypatch.setattr(preferences, "PreparedDataset", dataset)
    monkeypatch.setattr(pair_data, "PreparedDataset", dataset)
    monkeypatch.setattr(preferences, "CHUNK_VIDEOS", 2)
    monkeypatch.setattr(scoring, "PART_BATCHES", 1)
    monkeypatch.setattr(pipeline_model, "PROMPT_STEP", 8)  # few tokens are padded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that answers with a random mixture of a few words."""
    codec = micro_model.make_codec()
    model = micro_model.make_model(codec)
    path = tmp_path_factory.mktemp("model") / "model"
    params = micro_model.that_draws(micro_model.make_params(model), codec, "it moves left", "right")
    save_model(path, model.config, params, codec)
    return path


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A model whose every layer counts, so that its answers depend on what it is shown."""
    codec = micro_model.make_codec()
    model = micro_model.make_model(codec)
    path = tmp_path_factory.mktemp("reading") / "model"
    save_model(path, model.config, micro_model.make_params(model), codec)
    return path


def generate(folder, out, *more):
    return preferences.main(["generate", f"--model={folder}", "--data=memory", f"--out={out}",
                      "--judge=none", "--gap=-1", "--temperature=1", "--top_p=1", "--max_new=16",
                      "--batch_size=4", "--length_ratio=20", *more])


@pytest.fixture(scope="module")
def generated(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "PreparedDataset", dataset)
        patch.setattr(preferences, "CHUNK_VIDEOS", 2)
        generate(folder, out)
    return out


# --- in stages ---


@pytest.fixture(scope="module")
def server():
    """Writes one question, and thinks that the first answer is the better one."""

    def answer(text):
        if "Answer 2:" in text:
            return "better=1\ncorrect=both\nunclear=no"
        return "Question: What does the red circle do?\nAnswer: it moves left"

    with serving() as server:
        server.answer = answer
        yield server


def staged(folder, out, server, *more):
    return generate(
        folder, out, "--captioner=model", "--writer=endpoint", "--judge=endpoint",
        f"--endpoint={server.url}", "--endpoint_model=m", "--key_variable=", "--questions=3",
        "--samples=1", "--parts=2", "--caption_frames=8", "--reply_tokens=16",
        "--plugin_temperature=1", '--endpoint_body={"temperature": null}', "--workers=1", *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(folder, server, tmp_path_factory):
    out = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "PreparedDataset", dataset)
        patch.setattr(preferences, "CHUNK_VIDEOS", 2)
        patch.setattr(pipeline_model, "PROMPT_STEP", 8)
        assert staged(folder, out, server) == 0
    return out


def test_questions_of_the_split_are_asked_by_default_and_every_stage_keeps_its_records(generated):
    there = {name: lines(generated / file) for name, file in FILES.items()}
    assert [len(there[name]) for name in ("videos", "captions", "questions")] == [4, 16, 16]
    assert {r["failed"] for r in there["captions"]} == {"no caption among the conversations"}
    assert [r["id"] for r in there["questions"]][:2] == ["video2/talk/0", "video2/talk/1"]
    assert {r["source"] for r in there["questions"]} == {"test"}
    # What these seeds draw, whatever becomes of batches, stages and programs.
    assert [(p["example_id"], p["targets"]["chosen"], p["targets"]["rejected"])
            for p in there["pairs"][:2]] == GOLDEN
    for stage in ("preferred", "dispreferred"):
        assert all(len(r["answers"]) == 2 and r["temperature"] == 1 for r in there[stage])
    # Scored under the right frames: on a CPU the decoding program says the same, up to round-off.
    for record in there["preferred"]:
        drawn = [answer["logp"] for answer in record["answers"]]
        np.testing.assert_allclose(record["chosen_logp"], drawn, atol=1e-3)
    right, wrong = ({f"{r['id']}/sample{i}": logp for r in there[stage]
                     for i, logp in enumerate(r["chosen_logp"])}
                    for stage in ("preferred", "dispreferred"))
    assert {r["id"]: r["gap"] for r in there["filter"]} == {
        name: right[name] - wrong[name] for name in right}


def test_pairs_from_videos_without_questions(written, server):
    counts = json.loads((written / "counts.json").read_text())
    assert counts["captions"]["written"] > 4 and counts["questions"]["written"] > 4
    asked = len([r for name in ("questions", "filter") for r in lines(written / f"{name}.jsonl")
                 if "usage" in r])
    assert counts["endpoint"] == {"prompt_tokens": 10 * asked, "completion_tokens": 5 * asked,
                                  "cost": 0.0}
    drawn = {stage: {r["temperature"] for r in lines(written / FILES[stage])}
             for stage in ("captions", "questions", "filter")}  # of the model, then as it is sent
    assert drawn == {"captions": {1.0}, "questions": {None}, "filter": {None}}
    captions = {c["caption"] for c in lines(written / "captions.jsonl") if "caption" in c}
    texts = [body["messages"][0]["content"][-1]["text"] for _, _, body in server.requests]
    assert all(any(caption in text for text in texts) for caption in captions)
    found = PairedDataset("memory", written / "pairs.jsonl")
    pairs = [pair for video in found.videos for pair in found.examples(video)]
    assert len(pairs) == counts["written"] > 2
    for pair in pairs:
        assert pair.turns[0].question == "What does the red circle do?"
        assert len(pair.targets["chosen_indices"]) == len(pair.targets["frame_indices"]) == 8


def test_stages_that_were_stopped_go_on_and_give_the_same(folder, written, server, tmp_path,
                                                           monkeypatch, capsys):
    assert staged(folder, tmp_path, server, "--max_tokens=100") == 3
    assert "--max_tokens=100: 75 are spent" in capsys.readouterr().err
    calls = sigterm_in(monkeypatch, Manifest, "append", 9)
    assert staged(folder, tmp_path, server) == EXIT_STATUS
    stopped, before = calls["append"], len(server.requests)
    assert staged(folder, tmp_path, server) == 0
    names = sorted(file.name for file in written.glob("*.jsonl"))
    assert len(names) == 7
    for name in names:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    assert stopped < calls["append"] < sum(len(lines(written / name)) for name in names)
    paid = [r for name in names for r in lines(written / name) if "usage" in r]
    assert before < len(server.requests) and len(paid) == len(server.requests) / 2


@pytest.mark.parametrize("flags, message", [
    (["--reply_tokens=3"], "--reply_tokens: no plug-in is the model or an endpoint"),
    (["--judge=endpoint"], "--judge=endpoint: needs --endpoint"),
    (["--writer=model", "--tries=3", "--workers=9"], "--workers, --tries: no plug-in is the endp"),
    (["--writer=endpoint"], "--captioner=endpoint: needs --endpoint"),
    (["--writer=rules", "--max_tokens=5"], "--max_tokens: no plug-in is the endpoint"),
    (["--writer=endpoint", "--endpoint=http://127.0.0.1/v1"], "--endpoint_model: missing"),
    (["--writer=endpoint", "--endpoint=http://127.0.0.1/v1", "--endpoint_model=m",
      "--endpoint_body=[]"], "--endpoint_body=.*expected a JSON object"),
    (["--writer=rules", "--reply_tokens=0"], "--reply_tokens=0"),
])
def test_flags_that_do_not_go_together_are_refused_before_the_model_is_read(
        tmp_path, flags, message, capsys):
    assert generate("no-model", tmp_path, *flags) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)


def score(folder, pairs, out, *more):
    return preferences.main(["score", f"--model={folder}", "--data=memory", f"--pairs={pairs}",
                             f"--out={out}", "--batch_size=4", *more])


def test_generated_pairs_come_from_the_model_and_are_counted(generated):
    counts = json.loads((generated / "counts.json").read_text())
    assert counts["generated"] == VIDEOS * 4 * 2  # two samples of every question
    assert counts["generated"] == sum(counts["dropped"].values()) + counts["kept"]
    lines = (generated / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == counts["kept"] == counts["written"] > 5
    assert sum(counts["manipulation"].values()) == len(lines)
    assert counts["manipulation"].keys() == {"localized, segment unknown", "comprehensive"}
    pairs = [Example.from_json(json.loads(line)) for line in lines]
    assert len({pair.example_id for pair in pairs}) == len(pairs)
    said = {word for p in pairs for side in ("chosen", "rejected")
            for word in p.targets[side].split()}
    assert said and not said & {"blinks", "circle", "."}  # nothing but what the model can say
    for pair in pairs:
        assert pair.targets["chosen"] != pair.targets["rejected"]
        assert len(pair.targets["frame_indices"]) == len(pair.targets["manipulated_indices"]) == 8


def test_interrupted_generation_goes_on_and_gives_the_same(folder, generated, tmp_path,
                                                           monkeypatch):
    batches, begun, real = sigterm_in(monkeypatch, AnswerGenerator, "_batch", 0), [], Stages.run

    def run(self, videos, wanted):
        begun.append(batches["_batch"])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(self, videos, wanted)

    monkeypatch.setattr(Stages, "run", run)
    with pytest.raises(KeyboardInterrupt):
        generate(folder, tmp_path)
    assert not (tmp_path / "counts.json").exists()
    generate(folder, tmp_path)
    first = begun[1]
    assert first and begun == [0, first, first, first]  # the first chunk is not redone
    assert batches["_batch"] == 2 * first
    assert same_manifests(tmp_path, generated)


def same_manifests(out, other):
    return all((out / file).read_bytes() == (other / file).read_bytes() for file in FILES.values())


def test_shards_divide_the_chunks_and_give_the_same(
        folder, generated, tmp_path, capsys, monkeypatch):
    """Two commands, the second chunk first; what the model answers is known."""
    for side in ("preferred", "dispreferred"):
        known = {record["id"]: record for record in lines(generated / f"{side}.jsonl")}

        def answers(self, jobs, done, known=known):
            order = [name for name in known if name in {job["id"] for job in jobs}]
            yield from ((name, {key: known[name][key] for key in ("answers", "chosen_logp")
                                if key in known[name]}) for name in order)

        monkeypatch.setattr(pipeline_model.ModelAnswerer, side, answers)
    for shard in (1, 0):
        assert not (tmp_path / "pairs.jsonl").exists()
        assert generate(folder, tmp_path, "--shards=2", f"--shard={shard}") == 0
        part = tmp_path / "shards" / f"{shard}-of-2"
        assert [r["id"] for r in lines(part / "chunks.jsonl")] == [str(shard)]
        assert len(lines(part / "videos.jsonl")) == 2
        assert ("chunks [0] of 2 are left to the other shards" in capsys.readouterr().out) == shard
    assert same_manifests(tmp_path, generated)
    counts = [json.loads((out / "counts.json").read_text()) for out in (tmp_path, generated)]
    assert counts[0] | {"seconds": 0} == counts[1] | {"seconds": 0}


def test_devices_divide_generation_and_give_the_same(reading, tmp_path):
    """Eight devices: rows over four, weights over two, a row over two; and one."""
    found = []
    for devices in ((), ("--data_parallel=2", "--fsdp=2", "--context=2")):
        out = tmp_path / str(len(devices))
        assert generate(reading, out, "--samples=1", "--max_new=4", *devices) == 0
        found.append({stage: lines(out / FILES[stage]) for stage in ("preferred", "dispreferred")})
    one, several = found
    for stage, records in one.items():
        assert len(records) == VIDEOS * 4
        texts = [[[answer["text"] for answer in r["answers"]] for r in by[stage]] for by in found]
        assert texts[0] == texts[1] and len(set(map(str, texts[0]))) > 4
        for record, other in zip(records, several[stage], strict=True):
            assert record["id"] == other["id"]
            logps, others = ([*r["chosen_logp"], *(answer["logp"] for answer in r["answers"])]
                             for r in (record, other))
            np.testing.assert_allclose(others, logps, atol=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["--data_parallel=2", "--fsdp=3"], "--batch_size=4: does not divide over 6 devices"),
    (["--shards=2", "--shard=2"], "--shard=2: expected 0..1"),
])
def test_work_that_cannot_be_divided_so_is_refused(folder, tmp_path, flags, message, capsys):
    assert generate(folder, tmp_path, *flags) == 2
    assert f"error: {message}" in capsys.readouterr().err


def sigterm_in(monkeypatch, owner, name: str, call: int):
    """Sends this process a SIGTERM in the given call of owner.name; returns the count of calls."""
    real, calls = getattr(owner, name), collections.Counter()

    def wrapped(*args, **options):
        calls[name] += 1
        if calls[name] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def test_a_bucket_has_the_same_pairs_and_references_after_interruptions(
        folder, generated, tmp_path, monkeypatch):
    memory_bucket.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    out = epath.Path("gs://bucket/pairs")
    with monkeypatch.context() as patch:
        calls = sigterm_in(patch, Stages, "run", 2)
        assert generate(folder, out) == EXIT_STATUS
    assert calls["run"] == 2 and {path.name for path in out.iterdir()} == {
        "settings.json", *FILES.values()}
    assert generate(folder, out) == 0
    pairs = out / "pairs.jsonl"
    assert pairs.read_text() == (generated / "pairs.jsonl").read_text()
    with monkeypatch.context() as patch:
        sigterm_in(patch, RowBuilder, "build", 5)  # the first row of the second part
        assert score(folder, pairs, out / "reference.npz") == EXIT_STATUS
    parts = {path.name for path in (out / "reference.npz.parts").iterdir()}
    assert parts == {"00000.npz"}
    built = sigterm_in(monkeypatch, RowBuilder, "build", 0)
    assert score(folder, pairs, out / "reference.npz") == 0
    total = len(pairs.read_text().splitlines())
    assert built["build"] == total - 4  # the first part is not scored twice
    assert not (out / "reference.npz.parts").exists()
    assert score(folder, generated / "pairs.jsonl", tmp_path / "reference.npz") == 0
    there, here = (sidecar.read(where / "reference.npz") for where in (out, tmp_path))
    assert there.digests == here.digests and there.fingerprint == here.fingerprint
    for pair, logps in here.logps.items():
        np.testing.assert_array_equal(there.logps[pair], logps)
    assert len(PairedDataset("memory", pairs).videos) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_sigterm_stops_generation_at_the_next_batch(folder, generated, tmp_path, monkeypatch):
    calls = sigterm_in(monkeypatch, AnswerGenerator, "_batch", 3)
    assert generate(folder, tmp_path) == 75
    assert calls["_batch"] == 3 and not (tmp_path / "counts.json").exists()
    done = len(lines(tmp_path / "preferred.jsonl")) + len(lines(tmp_path / "dispreferred.jsonl"))
    assert done > 8  # every finished batch is kept
    assert generate(folder, tmp_path) == 0
    assert same_manifests(tmp_path, generated)


def test_sigterm_stops_scoring_at_the_next_batch(folder, generated, tmp_path, monkeypatch):
    pairs, out, whole = generated / "pairs.jsonl", tmp_path / "out.npz", tmp_path / "whole.npz"
    monkeypatch.setattr(scoring, "PART_BATCHES", 4)
    assert score(folder, pairs, whole) == 0
    total = len(sidecar.read(whole).logps)
    built = sigterm_in(monkeypatch, RowBuilder, "build", 5)  # the first row of the second batch
    assert score(folder, pairs, out) == EXIT_STATUS
    assert not out.exists() and 8 < total
    kept = {pair for file in (tmp_path / "out.npz.parts").iterdir()
            for pair in sidecar.read(file).logps}
    stopped = built["build"]
    assert len(kept) == 4 and stopped - 4 <= len(kept) <= stopped  # a quarter of the part
    assert score(folder, pairs, out) == 0
    assert built["build"] - stopped == total - len(kept)  # no batch was scored twice
    for pair, logps in sidecar.read(whole).logps.items():
        np.testing.assert_array_equal(sidecar.read(out).logps[pair], logps)


def test_generation_stops_when_there_are_enough(folder, tmp_path, capsys):
    generate(folder, tmp_path, "--pairs=2")
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "counts.json").read_text())["videos"] == 2  # one chunk


def test_another_command_into_the_same_folder_is_refused(folder, generated, capsys):
    assert generate(folder, generated, "--seed=1", "--mix=0.9") == 2
    error = capsys.readouterr().err
    assert f"error: {generated}: holds records that were made otherwise" in error
    assert "videos: seed: there 0, now 1" in error
    assert "questions: mix: there 0.5, now 0.9" in error


def test_sidecar_is_what_training_scores_at_step_0(folder, generated, tmp_path, monkeypatch):
    pairs, out = generated / "pairs.jsonl", tmp_path / "reference.npz"
    with monkeypatch.context() as patch:  # one of an older version, which is scored again
        patch.setattr(sidecar, "FORMAT_VERSION", 1)
        sidecar.write(out, sidecar.Sidecar(sidecar.Fingerprint(*"abcdefgh"), {}, {}))
    score(folder, pairs, out)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    config, params, codec = load_model(folder)
    expected = sidecar.Fingerprint.of(config, params, codec, 8)
    # Another bucket than the one that was scored with, as training has it.
    pipeline = Pipeline(
        [Source(PairedDataset("memory", pairs), 1.0, {"preference": 1.0})], codec, config,
        config.heads, [BUCKET], 0, reference=sidecar.reference([out], expected, BUCKET.answers))
    assert pipeline.describe_kinds([]) == pipeline.describe_kinds(["action", "order"]) == ""
    assert "pairs of the kinds ['action'] have no metrics" in pipeline.describe_kinds(["order"])
    model = micro_model.make_model(codec)
    step = jax.jit(make_score_step(model))
    for number in range(3):
        _, batch = pipeline.batch(number)
        live = np.asarray(step(params, batch)) * (batch["answer_weights"] > 0)
        assert np.abs(live).sum() > 1
        np.testing.assert_allclose(batch["reference_logps"], live, atol=1e-5)


def test_reference_of_another_model_is_refused(folder, generated, tmp_path):
    out = tmp_path / "reference.npz"
    score(folder, generated / "pairs.jsonl", out)
    config, params, codec = load_model(folder)
    params["language"]["final_norm"]["scale"] = params["language"]["final_norm"]["scale"] + 1
    expected = sidecar.Fingerprint.of(config, params, codec, 8)
    with pytest.raises(sidecar.SidecarMismatch) as error:
        sidecar.reference([out], expected, 20)
    stored = sidecar.read(out).fingerprint.weights
    assert stored in str(error.value) and expected.weights in str(error.value)


def test_interrupted_scoring_goes_on_and_a_finished_one_is_not_redone(
        folder, generated, tmp_path, monkeypatch):
    out, whole = tmp_path / "reference.npz", tmp_path / "whole.npz"
    score(folder, generated / "pairs.jsonl", whole)
    built = collections.Counter()
    real = scoring.batches

    def counted(builder, plans, *share):
        built["parts"] += 1
        if built["parts"] == 3:
            raise KeyboardInterrupt
        yield from real(builder, plans, *share)

    monkeypatch.setattr(scoring, "batches", counted)
    with pytest.raises(KeyboardInterrupt):
        score(folder, generated / "pairs.jsonl", out)
    assert not out.exists()
    score(folder, generated / "pairs.jsonl", out)
    first, second = sidecar.read(whole), sidecar.read(out)
    assert first.digests == second.digests
    for pair, logps in first.logps.items():
        np.testing.assert_array_equal(second.logps[pair], logps)
    parts = -(-len(first.logps) // 4)
    assert built["parts"] == parts + 1  # the interrupted part alone was begun twice
    score(folder, generated / "pairs.jsonl", out)
    assert built["parts"] == parts + 1


def test_shards_and_devices_divide_the_work_and_give_the_same(
        reading, generated, tmp_path, capsys):
    """Three commands, each with two of the fake devices in its own way, in any order."""
    out, whole = tmp_path / "reference.npz", tmp_path / "whole.npz"
    score(reading, generated / "pairs.jsonl", whole)
    for shard, devices in ((2, "--data_parallel=2"), (0, "--fsdp=2"), (1, "--context=2")):
        score(reading, generated / "pairs.jsonl", out, "--shards=3", f"--shard={shard}", devices)
        left = "left to the other shards" in capsys.readouterr().out
        assert left == (shard != 1) and out.exists() != left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["reference.npz", "whole.npz"]
    first, second = sidecar.read(whole), sidecar.read(out)
    assert first.fingerprint == second.fingerprint and first.digests == second.digests
    for pair, logps in first.logps.items():
        np.testing.assert_allclose(second.logps[pair], logps, atol=1e-5)
    assert len(first.logps) > 8  # at least a part for each
    assert score(folder, generated / "pairs.jsonl", out, "--shards=3", "--shard=3") == 2
    assert "error: --shard=3: expected 0..2" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"video_id": "video9"}, "'video9' is not in"),
    ({"task": "conversation"}, "expected 'preference'"),
    ({"format_version": 0}, "format_version is 0"),
    ({}, "occurs twice"),
])
def test_bad_manifest_names_the_line(generated, tmp_path, change, message):
    line = json.loads((generated / "pairs.jsonl").read_text().splitlines()[0])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(RecordError, match=f"bad.jsonl:2: .*{message}"):
        PairedDataset("memory", bad)
