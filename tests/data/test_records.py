import json
import pickle
import subprocess
import sys
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from media_samples import steady, write_image, write_video

from tpo_jax.data import mixture, tables
from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.ingest.plan import PrepareError, Settings, Source
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.records import Clip, Example, PreparedDataset, RecordError, Turn
from tpo_jax.data.video import read_video


def write_native(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def question(name, answer="yes", key="video"):
    return {
        key: name,
        "turns": [{"question": "moves?", "answer": answer, "options": ["yes", "no"]}],
    }


@pytest.fixture(scope="module", params=["raw", "jpeg"])
def prepared(request, tmp_path_factory):
    """A long video (three clips), a short one and an image."""
    folder = tmp_path_factory.mktemp(request.param)
    media = folder / "media"
    media.mkdir()
    write_video(media / "long.mp4", steady(10))
    write_video(media / "short.mp4", steady(1))
    write_image(media / "still.png")
    records = [question("long.mp4"), question("short.mp4"), question("still.png", key="image")]
    records.append(question("long.mp4", "no") | {"start": 4.5, "end": 9})
    annotations = write_native(folder / "a.jsonl", records)
    source = Source(media, "native", annotations, "test")
    settings = Settings(fps=8, encoding=request.param)
    prepare([source], folder / "out", settings, progress=False)
    return folder / "out"


def test_frames_are_those_of_the_decoder(prepared):
    dataset = PreparedDataset(prepared)
    truth = read_video(prepared.parent / "media" / "long.mp4")
    info = dataset.video_info("long.mp4")
    assert (info.media, info.num_frames, info.height, info.width) == ("video", 80, 48, 64)
    assert info.duration == pytest.approx(10)
    np.testing.assert_allclose(info.timestamps, truth.timestamps)
    encoding = dataset.settings["encoding"]
    assert info.stored == f"48 x 64 {encoding}"
    tolerance = 0 if encoding == "raw" else 2
    for indices in ([0, 79, 31, 32, 32, 5], [33, 33], list(range(80)), []):
        got = dataset.frames("long.mp4", np.array(indices, int))
        want = truth.frames[indices].astype(int) if indices else np.zeros((0, 48, 64, 3))
        assert got.dtype == np.uint8 and got.shape == want.shape
        assert not want.size or np.abs(got - want).mean() <= tolerance


def test_examples_and_index(prepared):
    dataset = PreparedDataset(prepared.parent, "out")
    assert dataset.videos == ["long.mp4", "short.mp4", "still.png"] and len(dataset) == 3
    whole, part = dataset.examples("long.mp4")
    assert (whole.start, whole.end) == (0, pytest.approx(10))
    assert (part.start, part.end, part.turns[0].answer) == (4.5, 9, "no")
    (image,) = dataset.examples("still.png")
    assert (image.media, image.start, image.end) == ("image", 0, 0)
    assert dataset.video_info("still.png").num_frames == 1


def test_a_kind_that_does_not_occur_is_named(prepared):
    config = {"path": str(prepared), "weight": 1.0, "tasks": {"conversation": 1.0}}
    (kind,) = PreparedDataset(prepared).kinds
    assert mixture.Source.from_config(config | {"kinds": [kind]}).kinds == (kind,)
    with pytest.raises(ValueError, match=r"kinds \['ordre'\] do not occur there, expected some of"):
        mixture.Source.from_config(config | {"kinds": ["ordre"]})


def test_indices_outside_are_an_error(prepared):
    dataset = PreparedDataset(prepared)
    for bad in ([8], [-1]):
        with pytest.raises(IndexError, match="short.mp4.*8 stored frames"):
            dataset.frames("short.mp4", np.array(bad))
    with pytest.raises(KeyError, match="nothing.mp4"):
        dataset.video_info("nothing.mp4")


def test_pickles_by_path_and_reads_from_threads(prepared):
    dataset = pickle.loads(pickle.dumps(PreparedDataset(prepared)))
    truth = dataset.frames("long.mp4", np.arange(80))
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 80, 20):
            if not (dataset.frames("long.mp4", [index])[0] == truth[index]).all():
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


READ_WITH_TFDS = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds
clips = tfds.builder_from_directory(sys.argv[1] + "/clips/1.0.0").as_data_source("all")
examples = tfds.builder_from_directory(sys.argv[1] + "/examples/1.0.0").as_data_source("all")
print(json.dumps({
    "clips": [[c["clip_id"].decode(), list(np.shape(c["frames"]))] for c in clips],
    "examples": [[e["video_id"].decode(), e["questions"][0].decode(),
                  [i.decode() for i in e["clip_ids"]]] for e in examples],
    "sum": int(np.asarray(clips[1]["frames"]).sum()),
    "tensorflow": "tensorflow" in sys.modules}))
"""


def test_tfds_reads_the_tables_without_tensorflow(prepared):
    run = subprocess.run(
        [sys.executable, "-c", READ_WITH_TFDS, str(prepared)],
        capture_output=True,
        text=True,
        check=True,
    )
    got = json.loads(run.stdout.strip().splitlines()[-1])
    assert not got["tensorflow"]
    assert got["clips"] == [
        ["long.mp4#0", [32, 48, 64, 3]],
        ["long.mp4#1", [32, 48, 64, 3]],
        ["long.mp4#2", [16, 48, 64, 3]],
        ["short.mp4#0", [8, 48, 64, 3]],
        ["still.png#0", [1, 20, 40, 3]],
    ]
    assert got["examples"][0] == ["long.mp4", "moves?", [f"long.mp4#{i}" for i in range(3)]]
    assert got["examples"][1][2] == ["long.mp4#1", "long.mp4#2"]  # 4.5 s to 9 s
    assert got["sum"] == int(PreparedDataset(prepared).frames("long.mp4", range(32, 64)).sum())


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    question=TEXT,
    answer=TEXT,
    options=st.lists(TEXT, max_size=4),
    start=st.floats(0, 1e5),
    boxes=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), max_size=3),
)
def test_example_survives_its_record(question, answer, options, start, boxes):
    turns = (Turn(question, answer, tuple(options), "kind"), Turn("q", "a"))
    targets = {"boxes": boxes, "rles": [None, {"size": [2, 2], "counts": "04"}]}
    example = Example("id", "v", "video", "region", "s", start, start + 1, turns, targets)
    timestamps = np.arange(3, dtype=np.float32)
    assert Example.from_record(example.to_record(timestamps)) == example
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_clip_survives_its_record():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    clip = Clip("v#2", "v", "video", 2, np.array([0, 0.1, 2], np.float32), frames, "raw")
    copy = Clip.from_record(clip.to_record())
    np.testing.assert_array_equal(copy.frames, frames)
    np.testing.assert_array_equal(copy.timestamps, clip.timestamps)
    assert (copy.clip_id, copy.video_id, copy.media, copy.chunk) == ("v#2", "v", "video", 2)


def test_example_of_another_version_is_refused():
    example = Example("id", "v", "video", "conversation", "s", 0, 1, (Turn("q", "a"),), {})
    with pytest.raises(RecordError, match="format_version is 99"):
        Example.from_json(example.to_json() | {"format_version": 99})
    with pytest.raises(RecordError, match="colour"):
        Example.from_json(example.to_json() | {"colour": "red"})


def test_unprepared_folders_are_refused(tmp_path):
    with pytest.raises(RecordError, match="not a prepared folder"):
        PreparedDataset(tmp_path)
    (tmp_path / "prepared.json").write_text('{"format_version": 99}')
    with pytest.raises(RecordError, match="format_version is 99"):
        PreparedDataset(tmp_path)


def test_derived_folder_shares_the_clips(prepared, tmp_path):
    source = PreparedDataset(prepared)
    targets = {"chosen": "yes", "rejected": "no", "manipulation": "localized", "frame_indices": [1]}
    turns = (Turn("moves?", "yes"),)
    pair = Example("p", "short.mp4", "video", "preference", "own", 0, 1, turns, targets)
    statistics = derive(source, [pair], tmp_path / "pairs")
    assert statistics["tasks"] == {"preference": 1}
    dataset = PreparedDataset(tmp_path / "pairs")
    assert dataset.videos == ["short.mp4"] and dataset.examples("short.mp4") == [pair]
    np.testing.assert_array_equal(
        dataset.frames("short.mp4", [3, 7]), source.frames("short.mp4", [3, 7])
    )
    shard = tables.shard_name("clips", 0, 1)
    assert (tmp_path / "pairs/clips/1.0.0" / shard).samefile(prepared / "clips/1.0.0" / shard)
    with pytest.raises(PrepareError, match="exists"):
        derive(source, [pair], tmp_path / "pairs")
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]
