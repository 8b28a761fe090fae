"""Clip features: the store and what it refuses, resampling, rows, and the way into the tables."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import memory_bucket
import numpy as np
import pytest
from fake_batches import bucket
from fake_dataset import example, image_info, video_info
from media_samples import write_media

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.clip_features import (
    ABOUT,
    FeatureError,
    FeatureStore,
    check,
    config_of_folders,
    resample,
)
from tpo_jax.data.evidence import apply_evidence
from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.ingest.plan import PrepareError, Settings, Source, make_plan
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.pipeline import blank_batch, row_builder
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import PreparedDataset, RecordError, Turn
from tpo_jax.data.rows import BranchPlan, RowError, RowPlan, stack_rows
from tpo_jax.data.task_text import TextDataset
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.evaluate import Part
from tpo_jax.models.config import ClipFeaturesConfig, ModelConfig
from tpo_jax.models.presets import PRESETS
from tpo_jax.models.video_language import FunctionalModel

SAMPLES = pathlib.Path(__file__).parent / "samples"
KIND = ClipFeaturesConfig(width=5, clip_seconds=2.0, encoder="by hand")


def numbers(clips, width=5, seed=0):
    return np.random.default_rng(seed).normal(size=(clips, width)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", KIND)


# --- the store ---


def test_what_is_written_is_read(store, tmp_path):
    names = {"clip.mp4": "clip.npz", "a/b_60.0_210.0.webm": "a/b_60.0_210.0.npz", "s/p": "s/p.npz"}
    for number, (video, file) in enumerate(names.items()):
        given = numbers(4, seed=number)
        store.write(video, given)
        assert store.file(video) == store.path / file
        read = FeatureStore(store.path).read(store.file(video), duration=8.0)
        np.testing.assert_array_equal(read, given)
        assert read.dtype == np.float32
    assert FeatureStore.create(store.path, KIND).about == KIND  # begun before
    assert store.file_of(pathlib.Path("/x/a/b_60.0_210.0.webm")) == store.path / names[
        "a/b_60.0_210.0.webm"]  # fmt: skip
    assert store.file_of(pathlib.Path("/x/y/clip.mp4")) == store.path / "clip.npz"
    assert store.file_of(pathlib.Path("/x/y/other.mp4")) == store.path / "other.npz"
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(Invalid, match="leaves the media folder"):
        store.file("../clip.mp4")


def test_what_is_stopped_while_it_is_written_is_not_there(store, monkeypatch):
    def stopped(file, features):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", stopped)
        with pytest.raises(KeyboardInterrupt):
            store.write("clip.mp4", numbers(4))
    assert [file.name for file in store.path.iterdir()] == [ABOUT]
    store.write("clip.mp4", numbers(4))
    assert store.file("clip.mp4").exists()


def test_half_precision_and_a_last_clip_more_or_less_are_taken(store):
    for count, duration in ((4, 8.0), (4, 7.2), (4, 9.9), (5, 8.0), (1, 0.4)):
        given = numbers(count).astype(np.float16)
        np.testing.assert_array_equal(check(given, KIND, duration), given.astype(np.float32))


@pytest.mark.parametrize(
    "field, value",
    [("encoder", "another"), ("clip_seconds", 1.0), ("width", 6)],
)
def test_a_store_of_other_features_is_not_written_into(store, field, value):
    other = dataclasses.replace(KIND, **{field: value})
    with pytest.raises(FeatureError) as error:
        FeatureStore.create(store.path, other)
    text = str(error.value)
    assert str(store.path / ABOUT) in text and field in text and "choose another --out" in text
    assert repr(getattr(KIND, field)) in text and repr(value) in text
    assert str(pickle.loads(pickle.dumps(error.value))) == text  # from a worker process


def saved(path, **arrays):
    np.savez(path, **arrays)


def pickled(path):
    array = np.empty(2, object)
    array[:] = [{"a": 1}, None]
    np.savez(path, features=array)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no features of this video. Fix: extract them with"),
        (lambda path: path.write_text("x"), "not an npz file"),
        (lambda path: saved(path, clip=numbers(4)), r"features: None: missing; the file has \['cl"),
        (pickled, "features: None: cannot be read .*allow_pickle=False"),
        (lambda path: saved(path, features=numbers(4, 6)), r"float32\[4, 6\]': expected 5 numbers"),
        (lambda path: saved(path, features=numbers(20)[0]), r"float32\[5\]': expected float\[N"),
        (lambda path: saved(path, features=np.ones((4, 5), int)), r"int64\[4, 5\]': expected floa"),
        (lambda path: saved(path, features=numbers(0)), r"float32\[0, 5\]': expected float\[N"),
        (lambda path: saved(path, features=numbers(8)),
         "8 clips of 2 s, expected 4.0 in 8.000 s of video. Fix: correct clip_seconds in feat"),
        (lambda path: saved(path, features=np.where(np.eye(4, 5, 1), np.nan, numbers(4))),
         r"features\[0, 1\]: nan: not a finite number, like 4 of 20"),
        (lambda path: saved(path, features=np.full((4, 5), 1e300)), r"features\[0, 0\]: inf: not"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_field_value_and_fix(store, write, message):
    file = store.file("clip.mp4")
    write(file)
    with pytest.raises(FeatureError, match=message) as error:
        store.read(file, duration=8.0)
    assert str(error.value).startswith(f"{file}:") and "Fix: " in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "format_version: 2: expected 1"),
        ({"width": "768"}, "width: '768': expected the numbers a clip"),
        ({"clip_seconds": 0}, "clip_seconds: 0: expected a number"),
        ({"encoder": " "}, "encoder: ' ': expected text"),
        ({"colour": "red"}, "colour: 'red': unknown key"),
    ],
)
def test_a_bad_features_json_is_named(store, change, message):
    about = json.loads((store.path / ABOUT).read_text()) | change
    (store.path / ABOUT).write_text(json.dumps(about))
    with pytest.raises(FeatureError, match=message):
        FeatureStore(store.path)
    (store.path / ABOUT).write_text("{")
    with pytest.raises(FeatureError, match="not JSON"):
        FeatureStore(store.path)
    (store.path / ABOUT).unlink()
    with pytest.raises(FeatureError, match="this is no folder of features"):
        FeatureStore(store.path)


# --- resampling ---


def test_clips_that_a_row_has_already_stay_as_they_are():
    """QVHighlights: 75 clips of 2 s, and frames that stand for 2 s each."""
    given = numbers(75)
    np.testing.assert_array_equal(resample(given, 2.0, 0.0, 150.0, 75), given)
    np.testing.assert_array_equal(resample(given, 2.0, 30.0, 50.0, 10), given[15:25])
    # Half of them, and twice as many.
    halves = given[:74].reshape(37, 2, 5).mean(axis=1)
    np.testing.assert_allclose(resample(given[:74], 2.0, 0.0, 148.0, 37), halves, rtol=1e-6)
    np.testing.assert_array_equal(
        resample(given, 2.0, 0.0, 150.0, 150), np.repeat(given, 2, axis=0)
    )


@pytest.mark.parametrize(
    "clips, seconds, start, end, parts",
    [(7, 2.0, 0.0, 13.3, 5), (7, 2.0, 1.7, 9.1, 4), (30, 1.0, 3.2, 28.9, 8), (3, 2.0, 0.3, 7.4, 9)],
)
def test_any_other_clip_is_the_mean_over_its_time(clips, seconds, start, end, parts):
    """Against a sum over a fine grid of times; what comes after the last clip belongs to it."""
    given, fine = numbers(clips), 4000
    times = start + (np.arange(parts * fine) + 0.5) * (end - start) / (parts * fine)
    at = np.minimum((times / seconds).astype(int), clips - 1)
    expected = given[at].astype(np.float64).reshape(parts, fine, -1).mean(axis=1)
    got = resample(given, seconds, start, end, parts)
    np.testing.assert_allclose(got, expected, atol=2e-3)


# --- rows ---


class Dataset:
    """One video of 8 seconds and an image, with features or without."""

    path = pathlib.Path("fake/train")

    def __init__(self, kind=KIND):
        self.clip_features_config, self.given = kind, numbers(4)

    def video_info(self, video_id):
        return video_info() if video_id == "v" else image_info()

    def frames(self, video_id, indices):
        return np.full((len(indices), 32, 32, 3), 7, np.uint8)

    def clip_features(self, video_id):
        assert video_id == "v"
        return self.given


def make_model(about=KIND):
    tokenizer = train_tokenizer(["When does the star grow? At", "What is it? A star."], 300)
    add_task_tokens(tokenizer, ("cg_detr",))
    codec = TextCodec(tokenizer)
    config = PRESETS["micro"](("cg_detr",), codec.task_tokens)
    return codec, dataclasses.replace(config, clip_features=about)


def builder(about=KIND, **changes):
    codec, config = make_model(about)
    slots = {"temporal": 2}
    return row_builder(codec, config, bucket(2, frames=4, branch_tokens=40, answers=16,
                                             slots=slots, **changes))  # fmt: skip


def when(answer="At <temporal>.", video="v", media="video", end=8.0):
    return example("e", video, "temporal", [Turn("When does the star grow?", answer)],
                   {"windows": [[2.0, 4.0]]}, media=media, end=end)  # fmt: skip


def plan(dataset, example, answer=True, start=0.0):
    turn = example.turns[0]
    branch = BranchPlan(example, 0, turn.question, turn.answer if answer else None)
    return RowPlan(dataset, example.video_id, start, example.end, (branch,))


def test_rows_bring_the_features_of_their_part_of_the_video():
    rows, dataset = builder(), Dataset()
    rows.check(plan(dataset, when()))
    row = rows.build(plan(dataset, when()), 0)
    np.testing.assert_array_equal(row["clip_features"], dataset.given)
    row = rows.build(plan(dataset, when(), answer=False, start=4.0), 0)
    repeated = np.repeat(dataset.given[2:], 2, axis=0)
    np.testing.assert_array_equal(row["clip_features"], repeated)


def test_shapes_are_those_of_the_program_and_nothing_is_added_without_them():
    for shapes in (bucket(2), bucket(2, media="image", frames=1)):
        codec, config = make_model()
        plain = dataclasses.replace(config, clip_features=None)
        added = set()
        for each in (config, plain):
            built = blank_batch(row_builder(codec, each, shapes))
            spec = batch_spec(shapes, each)
            want = jax.tree.map(lambda x: (x.shape, x.dtype), built)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), spec) == want
            added ^= set(built)
        assert added == {"clip_features"}


def test_missing_and_other_features_are_refused_where_they_are_read():
    rows = builder()
    for given in (True, False):
        with pytest.raises(RowError, match="fake/train: example 'e', turn 0, bucket 'video': clip_"
                           "features: None: the folder has none.*--features=FOLDER"):  # fmt: skip
            rows.check(plan(Dataset(None), when(), answer=given))
    other = dataclasses.replace(KIND, encoder="another")
    with pytest.raises(RowError, match="clip_features.encoder: 'another': expected 'by hand'"):
        rows.check(plan(Dataset(other), when()))
    # Nobody reads them in an answer that is given and calls no head, or of an image.
    row = rows.build(plan(Dataset(None), when("A star.")), 0)
    assert not row["clip_features"].any()
    image = when("A star.", "i", "image", 0.0)
    rows = builder(media="image")
    assert not rows.build(plan(Dataset(), image, answer=False), 0)["clip_features"].any()


def test_hidden_frames_take_their_features_with_them():
    rows, dataset = builder(), Dataset()
    batch = stack_rows([rows.build(plan(dataset, when()), i) for i in range(2)])
    assert not apply_evidence(batch, "blind")["clip_features"].any()
    kept = apply_evidence(batch, "middle_frame")["clip_features"]
    np.testing.assert_array_equal(kept[:, 2], np.stack([dataset.given[2]] * 2))
    assert not np.delete(kept, 2, axis=1).any()


def test_the_model_config_keeps_them_and_refuses_them_without_a_reader():
    codec, config = make_model()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "clip_features" not in dataclasses.replace(config, clip_features=None).to_dict()
    with pytest.raises(ValueError, match="clip_features.width=0: must be above 0"):
        dataclasses.replace(KIND, width=0)
    light = dataclasses.replace(PRESETS["micro"](("temporal",)), clip_features=KIND)
    with pytest.raises(ValueError, match=r"none of heads=\('temporal',\) reads them"):
        FunctionalModel(light)


# --- the tables ---


def prepare_samples(folder, store, out="out", **changes):
    """Prepares examples about two videos of four seconds and an image."""
    media = folder / "media"
    if not media.exists():
        write_media(media)
    source = Source(media, "native", SAMPLES / "native.jsonl", "test")
    settings = Settings(size=16, **changes)
    return prepare([source], folder / out, settings, progress=False, features=store)


def test_prepare_keeps_the_features_beside_the_frames(store, tmp_path):
    given = {f"clip_{name}.mp4": numbers(2, seed=ord(name)) for name in "ab"}
    for video, features in given.items():
        store.write(video, features)
    assert prepare_samples(tmp_path, store)["quarantined"] == 0
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.clip_features_config == KIND and dataset.settings["size"] == 16
    assert config_of_folders([str(tmp_path / "out")]) == KIND
    targets = {"chosen": "A", "rejected": "B", "manipulation": "localized"}
    pair = {"turns": (Turn("Who?", "A"),), "targets": targets}
    pairs = tmp_path / "pairs.jsonl"
    (asked,) = (e for e in dataset.examples("clip_a.mp4") if e.task == "temporal")
    asked = dataclasses.replace(asked, task="preference", **pair)
    pairs.write_text(json.dumps(asked.to_json()) + "\n")
    derived = tmp_path / "derived"
    derive(dataset, [asked], derived)
    views = [dataset, PairedDataset(tmp_path / "out", pairs), TextDataset(dataset)]
    for view in (*views, Part(dataset, 0, 0), PreparedDataset(derived)):
        assert view.clip_features_config == KIND
        for video in set(view.videos) & set(given):
            np.testing.assert_array_equal(view.clip_features(video), given[video])
    # The table is readable by TFDS as well.
    import tensorflow_datasets as tfds

    table = tfds.builder_from_directory(tmp_path / "out/clip_features/1.0.0").as_data_source("all")
    assert {record["video_id"].decode() for record in table} == set(given)
    for record in table:
        np.testing.assert_array_equal(record["features"], given[record["video_id"].decode()])


def test_features_in_a_bucket_are_those_of_a_folder(store, tmp_path, monkeypatch):
    memory_bucket.install(monkeypatch)
    there = FeatureStore.create("gs://bucket/features", KIND)
    for number, video in enumerate(("clip_a.mp4", "clip_b.mp4")):
        for one in (store, there):
            one.write(video, numbers(2, seed=number))
    names = {path.name for path in there.path.iterdir()}
    assert names == {path.name for path in store.path.iterdir()} and len(names) == 3
    found = [prepare_samples(tmp_path / str(number), FeatureStore(one.path))
             for number, one in enumerate((store, there))]  # fmt: skip
    assert found[0] == found[1] and found[0]["videos"] == 2
    local, other = (PreparedDataset(tmp_path / str(number) / "out") for number in range(2))
    for video in ("clip_a.mp4", "clip_b.mp4"):
        np.testing.assert_array_equal(local.clip_features(video), other.clip_features(video))
    there.file("clip_a.mp4").write_bytes(b"PK")
    with pytest.raises(FeatureError, match="gs://bucket/features/clip_a.npz.*not an npz file"):
        there.read(there.file("clip_a.mp4"), 4.0)


def test_bad_features_take_the_records_of_their_video(store, tmp_path):
    store.write("clip_a.mp4", numbers(7))  # of a video of four seconds
    found = prepare_samples(tmp_path, store)
    assert found["quarantined"] == 4 and found["images"] == 1 and found["videos"] == 0
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    by_record = {entry["record"]: entry for entry in map(json.loads, lines)}
    assert {entry["field"] for entry in by_record.values()} == {"clip_features"}
    assert "7 clips of 2 s" in by_record["line 1"]["reason"]
    assert "clip_a.npz features float32[7, 5]" in by_record["line 1"]["value"]
    assert "no features of this video" in by_record["line 4"]["reason"]
    # Without any video the folder has no features, and says so where they are asked for.
    assert PreparedDataset(tmp_path / "out").clip_features_config is None
    with pytest.raises(RecordError, match="none of .* has clip features"):
        config_of_folders([str(tmp_path / "out")])


def test_a_changed_file_of_features_redoes_its_piece_only(store, tmp_path, monkeypatch):
    from tpo_jax.data.ingest import plan as plan_lib

    monkeypatch.setattr(plan_lib, "PIECE_MEDIA", 1)
    source = Source(write_media(tmp_path / "media"), "native", SAMPLES / "native.jsonl", "test")

    def keys(features):
        return [piece.key for piece in make_plan([source], Settings(), features).pieces]

    before = keys(store)
    assert len(before) == 3 and set(before).isdisjoint(keys(None))
    store.write("clip_b.mp4", numbers(2))
    assert [a == b for a, b in zip(before, keys(store), strict=True)] == [True, False, True]


def test_two_videos_cannot_share_a_file_of_features(store, tmp_path):
    media = write_media(tmp_path / "media")
    shutil.copy(media / "clip_a.mp4", media / "clip_a.mov")
    lines = [json.dumps({"video": f"clip_a.{suffix}", "turns": [{"question": "?", "answer": "!"}]})
             for suffix in ("mp4", "mov")]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Source(media, "native", tmp_path / "a.jsonl", "test")
    with pytest.raises(PrepareError, match=r"clip_a.npz would be .* of clip_a.mov and of clip_a.m"):
        make_plan([source], Settings(), store)


def test_folders_of_a_run_have_the_same_features(store, tmp_path):
    for name, kind in (("one", KIND), ("two", dataclasses.replace(KIND, clip_seconds=1.0))):
        (tmp_path / name).mkdir()
        about = {"format_version": 1, "clip_features": dataclasses.asdict(kind)}
        (tmp_path / name / "prepared.json").write_text(json.dumps(about))
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "prepared.json").write_text('{"format_version": 1}')
    folders = [str(tmp_path / name) for name in ("one", "two", "chat")]
    assert config_of_folders([folders[0], folders[2]]) == KIND
    with pytest.raises(RecordError, match="two/prepared.json: clip_features.clip_seconds: 1.0,"):
        config_of_folders(folders)


def test_the_documented_way_from_published_files(tmp_path, monkeypatch):
    """docs/heads.md: one npz a video of each of two encoders, as QVHighlights publishes them."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "heads.md").read_text()
    (code,) = (part for part in text.split("```")[1::2] if "slowfast_features" in part)
    monkeypatch.chdir(tmp_path)
    given = {"slowfast": numbers(75, 2304), "clip": numbers(76, 512).astype(np.float16)}
    for name, features in given.items():
        (tmp_path / f"{name}_features").mkdir()
        np.savez(tmp_path / f"{name}_features" / "yt_60.0_210.0.npz", features=features)
    exec(code.removeprefix("python\n"), {})
    store = FeatureStore("features")
    read = store.read(store.file("yt_60.0_210.0.mp4"), duration=150.0)
    assert read.shape == (75, 2816)
    for part in (read[:, :2304], read[:, 2304:]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-4)
