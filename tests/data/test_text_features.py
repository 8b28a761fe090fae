"""Text features: the store and what it refuses, the way into tables and rows, and to a head."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from fake_batches import bucket
from fake_dataset import example, image_info, video_info
from media_samples import write_media

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.clip_features import ABOUT, FeatureError, FeatureStore, config_of_folders
from tpo_jax.data.formats import asking
from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.ingest.plan import Settings, Source, make_plan
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.pipeline import blank_batch, row_builder
from tpo_jax.data.records import PreparedDataset, RecordError, Turn
from tpo_jax.data.rows import BranchPlan, RowError, RowPlan
from tpo_jax.data.task_text import TextDataset
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.data.text_features import Asked, question_name
from tpo_jax.evaluate import Part
from tpo_jax.models.config import ClipFeaturesConfig, ModelConfig, TextFeaturesConfig
from tpo_jax.models.presets import PRESETS

SAMPLES = pathlib.Path(__file__).parent / "samples"
CLIPS = ClipFeaturesConfig(width=5, clip_seconds=2.0, encoder="by hand")
WIDTH = PRESETS["micro"](()).language.width
KIND = TextFeaturesConfig(width=WIDTH, tokens=6, encoder="by hand, summarize:")
ASKED = "When does the star grow?"


def states(tokens, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", CLIPS, KIND)


def test_what_is_written_is_read_by_the_text_of_the_question(store):
    given = states(4)
    store.write_text(ASKED, given)
    assert question_name(ASKED) == question_name(f" {ASKED}\n") == "f8c495172c136bb34e35"
    assert store.text_file(ASKED) == store.path / "text/f8c495172c136bb34e35.npz"
    again = FeatureStore(store.path)
    assert (again.about, again.text) == (CLIPS, KIND)
    np.testing.assert_array_equal(again.read_text(f"{ASKED} "), given)
    with pytest.raises(FeatureError, match="there are no text features of 'Who\\?'"):
        again.read_text("Who?")


def test_they_join_clip_features_that_were_there_before(tmp_path):
    plain = FeatureStore.create(tmp_path, CLIPS)
    plain.write("v.mp4", states(4, 5))
    assert plain.text is None and "text" not in json.loads((tmp_path / ABOUT).read_text())
    assert FeatureStore.create(tmp_path, CLIPS, KIND).text == KIND
    assert FeatureStore.create(tmp_path, CLIPS).text == KIND  # stays
    assert plain.file("v.mp4").exists()
    other = dataclasses.replace(KIND, encoder="another")
    with pytest.raises(FeatureError, match="text.encoder: 'by hand, summarize:': expected 'anoth"):
        FeatureStore.create(tmp_path, CLIPS, other)
    with pytest.raises(FeatureError, match="text: None: the folder has no text features"):
        bare = FeatureStore.create(tmp_path / "bare", CLIPS)
        bare.require(CLIPS, KIND, "extract them")


@pytest.mark.parametrize("array, message", [
    (states(4, WIDTH + 1), rf"txt: 'float32\[4, {WIDTH + 1}\]': expected float\[n, {WIDTH}\] with"),
    (states(7), r"float32\[7, .*with n of 1 to 6, one row a token"),
    (states(0), r"float32\[0,"),
    (np.where(np.eye(4, WIDTH, 1), np.nan, states(4)), r"txt\[0, 1\]: nan: not a finite number"),
])  # fmt: skip
def test_a_bad_file_is_named_with_field_value_and_fix(store, array, message):
    store.write_text(ASKED, array)
    with pytest.raises(FeatureError, match=message) as error:
        store.read_text(ASKED)
    assert str(error.value).startswith(f"{store.text_file(ASKED)}:")


def test_another_array_and_pickles_are_refused(store):
    file = store.text_file(ASKED)
    file.parent.mkdir()
    np.savez(file, last_hidden_state=states(4))
    with pytest.raises(FeatureError, match=r"txt: None: missing; the file has \['last_hidden_sta"):
        store.read_text(ASKED)


@pytest.mark.parametrize("change, message", [
    ({"tokens": 0}, "text.tokens: 0: expected 1 or more"),
    ({"width": "4"}, "text.width: '4': expected 1 or more"),
    ({"encoder": " "}, "text.encoder: ' ': expected text"),
    ({"seconds": 1}, "text: .*: expected encoder, width and tokens"),
])  # fmt: skip
def test_a_bad_features_json_is_named(store, change, message):
    about = json.loads((store.path / ABOUT).read_text())
    about["text"] |= change
    (store.path / ABOUT).write_text(json.dumps(about))
    with pytest.raises(FeatureError, match=message):
        FeatureStore(store.path)


# --- the tables ---


QUESTIONS = {  # of samples/native.jsonl
    "clip_a.mp4": ("What moves first?", "When does the circle stop?"),
    "clip_b.mp4": ("Follow what is at <box>.", "What happens?"),
}


def prepare_samples(folder, store, out="out"):
    media = folder / "media"
    if not media.exists():
        write_media(media)
    source = Source(media, "native", SAMPLES / "native.jsonl", "test")
    return prepare([source], folder / out, Settings(size=16), progress=False, features=store)


def write_clips(store):
    for name in "ab":
        store.write(f"clip_{name}.mp4", states(2, 5))


def test_prepare_keeps_those_of_its_questions(store, tmp_path):
    write_clips(store)
    given = prepare_samples(tmp_path, store, "first")
    # The one temporal question has none; the other records do not need any.
    lines = (tmp_path / "first/quarantine.jsonl").read_text().splitlines()
    (entry,) = map(json.loads, lines)
    assert entry["field"] == "text_features" and "there are no text features of" in entry["reason"]
    plain = PreparedDataset(tmp_path / "first")
    assert plain.texts is None and "text_features" not in plain.settings

    for number, question in enumerate((*QUESTIONS["clip_a.mp4"], *QUESTIONS["clip_b.mp4"])):
        store.write_text(question, states(3, seed=number))
    found = prepare_samples(tmp_path, store)
    assert found["quarantined"] == 0 and given["quarantined"] == 1
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.settings["text_features"] == dataclasses.asdict(KIND)
    assert config_of_folders([str(tmp_path / "out")], "text_features") == KIND
    with pytest.raises(RecordError, match="config.text_features=True: none of .* has text featur"):
        config_of_folders([str(tmp_path / "first")], "text_features")
    derive(dataset, dataset.examples("clip_b.mp4")[:1], tmp_path / "derived")
    derived = PreparedDataset(tmp_path / "derived")
    for view, videos in ((dataset, "ab"), (Part(dataset, 0, 0), "ab"), (TextDataset(dataset), "ab"),
                         (derived, "b")):  # fmt: skip
        for video in (f"clip_{name}.mp4" for name in videos):
            for question in QUESTIONS[video]:
                assert view.texts.has(video, question)
                np.testing.assert_array_equal(
                    view.texts.read(video, question), store.read_text(question)
                )
            assert not view.texts.has(video, "Who?")
        assert not view.texts.has("still.png", "Where is the circle?")
    # The table is readable by TFDS as well.
    import tensorflow_datasets as tfds

    table = tfds.builder_from_directory(tmp_path / "out/text_features/1.0.0").as_data_source("all")
    for record in table:
        question = record["question"].decode()
        assert question in QUESTIONS[record["video_id"].decode()]
        np.testing.assert_array_equal(record["txt"], store.read_text(question))
    assert len(table) == 4


def test_a_changed_file_redoes_its_piece_only(store, tmp_path, monkeypatch):
    from tpo_jax.data.ingest import plan as plan_lib

    monkeypatch.setattr(plan_lib, "PIECE_MEDIA", 1)
    media = write_media(tmp_path / "media")
    source = Source(media, "native", SAMPLES / "native.jsonl", "test")

    def pieces():
        return make_plan([source], Settings(), store).pieces

    before = pieces()
    store.write_text("What happens?", states(2))
    changed = [a.key != b.key for a, b in zip(before, pieces(), strict=True)]
    assert changed == [item.video_id == "clip_b.mp4" for piece in before for item in piece.items]
    assert sum(changed) == 1 and len(changed) == 3


# --- rows ---


class Dataset:
    """One video of 8 seconds and an image, whose questions have features or not."""

    path = pathlib.Path("fake/train")
    clip_features_config = None

    def __init__(self, texts):
        self.texts = texts

    def video_info(self, video_id):
        return video_info() if video_id == "v" else image_info()

    def frames(self, video_id, indices):
        return np.full((len(indices), 32, 32, 3), 7, np.uint8)


def make_model(about=KIND):
    tokenizer = train_tokenizer([f"{ASKED} At", "What is it? A star."], 300)
    add_task_tokens(tokenizer, ("cg_detr",))
    codec = TextCodec(tokenizer)
    config = PRESETS["micro"](("cg_detr",), codec.task_tokens)
    return codec, dataclasses.replace(config, text_features=about)


def builder(**changes):
    codec, config = make_model()
    shapes = bucket(2, frames=4, branch_tokens=40, answers=16, slots={"temporal": 2}, **changes)
    return row_builder(codec, config, shapes)


def plan(dataset, *answers, video="v", media="video", end=8.0):
    branches = []
    for answer in answers:
        question = ASKED if answer is None or "<temporal>" in answer else "What is it?"
        targets = {"windows": [[2.0, 4.0]]}
        made = example("e", video, "temporal", [Turn(question, answer or "")], targets,
                       media=media, end=end)  # fmt: skip
        branches.append(BranchPlan(made, 0, question, answer))
    return RowPlan(dataset, video, 0.0, end, tuple(branches))


def test_rows_bring_those_of_each_branch():
    given = Asked(KIND, ASKED, states(4))
    rows, row_plan = builder(), plan(Dataset(given), "A star.", "At <temporal>.")
    rows.check(row_plan)
    row = rows.build(row_plan, 0)
    assert row["text_features"].shape == (2, 6, WIDTH)
    np.testing.assert_array_equal(row["text_features"][1, :4], given.states)
    np.testing.assert_array_equal(row["text_valid"].astype(int), [[0] * 6, [1, 1, 1, 1, 0, 0]])
    assert not row["text_features"][0].any() and not row["text_features"][1, 4:].any()


def test_missing_and_other_ones_are_refused_where_they_are_read():
    rows = builder()
    for answer in ("At <temporal>.", None):
        with pytest.raises(RowError, match="fake/train: example 'e', turn 0, bucket 'video': text_f"
                           "eatures: 'When does the star grow\\?': none of this question, but a h"
                           ".*--features=FOLDER"):  # fmt: skip
            rows.check(plan(Dataset(None), answer))
    other = Asked(dataclasses.replace(KIND, encoder="another"), ASKED, states(4))
    with pytest.raises(RowError, match="text_features.encoder: 'another': expected 'by hand, summ"):
        rows.check(plan(Dataset(other), "At <temporal>."))
    assert not rows.build(plan(Dataset(None), "A star."), 0)["text_valid"].any()
    image = plan(Dataset(None), None, video="i", media="image", end=0.0)
    assert not builder(media="image").build(image, 0)["text_valid"].any()


def test_shapes_are_those_of_the_program_and_nothing_is_added_without_them():
    codec, config = make_model()
    added = set()
    for each in (config, dataclasses.replace(config, text_features=None)):
        shapes = bucket(2)
        built = blank_batch(row_builder(codec, each, shapes))
        want = jax.tree.map(lambda x: (x.shape, x.dtype), built)
        spec = jax.tree.map(lambda x: (x.shape, x.dtype), batch_spec(shapes, each))
        assert spec == want
        added ^= set(built)
    assert added == {"text_features", "text_valid"}


def test_the_model_config_keeps_them():
    _, config = make_model()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "text_features" not in dataclasses.replace(config, text_features=None).to_dict()
    with pytest.raises(ValueError, match="text_features.tokens=0: must be above 0"):
        dataclasses.replace(KIND, tokens=0)


def test_the_documented_way_from_published_files(tmp_path, monkeypatch):
    """docs/heads.md: one npz a query with the states of a text encoder."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "heads.md").read_text()
    (code,) = (part for part in text.split("```")[1::2] if "write_text" in part)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text_features").mkdir()
    queries = [{"qid": 3, "query": "a man cooks."}, {"qid": 4, "query": "two dogs run"}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    for query in queries:
        np.savez(f"text_features/qid{query['qid']}.npz",
                 last_hidden_state=states(5, 4096, query["qid"]))  # fmt: skip
    exec(code.removeprefix("python\n"), {})
    store = FeatureStore("features")
    for query in queries:
        question = asking.moment(query["query"]).question
        np.testing.assert_array_equal(store.read_text(question), states(5, 4096, query["qid"]))
