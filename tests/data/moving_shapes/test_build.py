"""Whole data sets: files, published formats, splits, the command."""

import configparser
import json

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tpo_jax.data.formats import FORMATS
from tpo_jax.data.formats.reading import Context
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.moving_shapes import WorldConfig, build, render, simulate
from tpo_jax.data.moving_shapes.__main__ import main, parse_splits
from tpo_jax.data.moving_shapes.build import BuildError, scene_seed

CONFIG = WorldConfig()
VIDEOS = {"train": 5, "validation": 2, "test": 2}
IMAGES = {"train": 2, "validation": 1, "test": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "world"
    build(out, VIDEOS, IMAGES, seed=4, config=CONFIG)
    return out


def _json(path):
    return json.loads(path.read_text())


def _files(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _scene(name):
    split, index = name.split("_")
    return simulate(scene_seed(4, split, "video", int(index)), CONFIG)


def test_videos_are_h264_with_every_frame(folder):
    for path in folder.glob("*/videos/*.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.format.name == "yuv420p"
            frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        assert [t for t, _ in frames] == [i / CONFIG.fps for i in range(CONFIG.num_frames)]
        expected = render(_scene(path.stem)).frames
        assert np.abs(np.stack([f for _, f in frames]).astype(int) - expected).mean() < 5


def test_images_are_png(folder):
    paths = list(folder.glob("*/images/*.png"))
    assert len(paths) == sum(IMAGES.values())
    assert all(Image.open(p).size == (64, 64) for p in paths)


@pytest.mark.parametrize("split", VIDEOS)
def test_our_readers_take_every_record_without_a_problem(folder, split):
    manifest = _json(folder / split / "dataset.json")
    media = MediaFolder(folder / split / manifest["media"])
    written = {"videochat2", "qvhighlights", "refcoco", "mevis", "got10k", "thumos"}
    assert {a["format"] for a in manifest["annotations"]} == written
    assert set(manifest["info"]["tasks"]) == written
    examples = []
    for entry in manifest["annotations"]:
        context = Context(folder / split / entry["path"], "shapes", media)
        drafts, problems = FORMATS[entry["format"]].read(context)
        assert drafts and not problems, problems[:2]
        examples += [d.example for d in drafts]
    assert len({e.example_id for e in examples}) == len(examples)
    assert {e.video_id for e in examples} == set(
        [f"videos/{split}_{i:06d}.mp4" for i in range(VIDEOS[split])]
        + [f"images/{split}_image_{i:06d}.png" for i in range(IMAGES[split])]
    )


def test_conversations_name_kind_and_right_option(folder):
    for path in (folder / "train" / "conversation").glob("*.json"):
        for record in _json(path):
            for turn in record["QA"]:
                # An instruction would stand before every question.
                assert turn["kind"] == path.stem and turn["i"] == ""
                if "Options:" in turn["q"]:
                    lines = turn["q"].split("\n")
                    assert [line[:3] for line in lines[2:]] == ["(A)", "(B)", "(C)", "(D)"]
                    assert turn["a"] in lines


def test_highlights_cover_their_windows(folder):
    lines = (folder / "train" / "temporal.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["qid"] for row in rows] == list(range(len(rows)))
    for row in rows:
        events = [e for e in _scene(row["vid"]).events]
        for window in row["relevant_windows"]:
            assert window in [[e.start, e.end] for e in events]
        inside = {c for s, e in row["relevant_windows"] for c in range(8)
                  if min(e, 2 * c + 2) > max(s, 2 * c)}  # fmt: skip
        assert row["relevant_clip_ids"] == sorted(inside)
        for clip, ratings in zip(row["relevant_clip_ids"], row["saliency_scores"], strict=True):
            score = round(4 * _covered(row, clip) / max(_covered(row, c) for c in range(8)))
            assert len(ratings) == 3 and all(0 <= r <= 4 for r in ratings)
            assert all(score - 1 <= r <= score for r in ratings)


def _covered(row, clip) -> float:
    """Seconds of a two-second clip that the windows of a QVHighlights row cover."""
    return sum(max(0, min(e, 2 * clip + 2) - max(s, 2 * clip)) for s, e in row["relevant_windows"])


def test_masks_are_the_visible_pixels(folder):
    videos = _json(folder / "train" / "mevis" / "meta_expressions.json")["videos"]
    table = _json(folder / "train" / "mevis" / "mask_dict.json")
    frames = _json(folder / "train" / "dataset.json")["info"]["annotation_frames"]
    assert frames == list(range(0, 128, 4))
    nulls = 0
    for name, entry in videos.items():
        visible = render(_scene(name)).visible
        assert len(entry["frames"]) == len(frames)
        for item in entry["expressions"].values():
            (actor,), (anno,) = item["obj_id"], item["anno_id"]
            for rle, frame in zip(table[str(anno)], frames, strict=True):
                truth = visible[actor, frame]
                if rle is None:
                    assert truth.sum() < 12
                    nulls += 1
                else:
                    np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), truth)
    assert nulls


def test_boxes_enclose_what_they_refer_to(folder):
    data = _json(folder / "train" / "region.json")
    images = {i["id"]: i for i in data["images"]}
    boxes = {b["id"]: b for b in data["annotations"]}
    for box in boxes.values():
        mask = coco_mask.decode(box["segmentation"])
        assert list(coco_mask.toBbox(box["segmentation"])) == box["bbox"]
        assert mask.sum() == box["area"]
    for ref in data["refs"]:
        box, text = boxes[ref["ann_id"]], ref["sentences"][0]["sent"]
        image = images[box["image_id"]]
        assert text.startswith("the ") and ref["image_id"] == image["id"]
        assert ("time" in image) == image["file_name"].endswith(".mp4")
    texts = " ".join(r["sentences"][0]["sent"] for r in data["refs"])
    assert " that " in texts and (" of the " in texts or " above " in texts or " below " in texts)


def test_tracks_are_got10k_sequences(folder):
    root = folder / "train" / "tracking"
    names = (root / "list.txt").read_text().split()
    assert names and {p.name for p in root.iterdir() if p.is_dir()} == set(names)
    for name in names:
        video, actor = name.split("#")
        visible = render(_scene(video)).visible[int(actor), ::4]
        lines = (root / name / "groundtruth.txt").read_text().splitlines()
        absent = (root / name / "absence.label").read_text().split()
        assert len(lines) == len(absent) == len(visible) == 32
        assert absent[0] == "0"
        boxes = np.array([line.split(",") for line in lines], float)[np.array(absent) == "0"]
        assert np.mean(coco_mask.iou(boxes, boxes[:1], [0]) >= 0.5) <= 0.5, "it stays in place"
        for line, gone, mask in zip(lines, absent, visible, strict=True):
            x, y, w, h = map(int, line.split(","))
            if gone == "1":
                assert mask.sum() < 12
            else:
                rows, columns = np.nonzero(mask)
                assert (x, y) == (columns.min(), rows.min())
                assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
        meta = configparser.ConfigParser()
        meta.read(root / name / "meta_info.ini")
        assert meta["METAINFO"]["anno_fps"] == "2Hz"


def test_actions_are_all_events(folder):
    database = _json(folder / "test" / "actions.json")["database"]
    assert len(database) == VIDEOS["test"]
    for name, entry in database.items():
        expected = [{"segment": [e.start, e.end], "label": e.action} for e in _scene(name).events]
        assert entry["annotations"] == expected and entry["subset"] == "test"


def test_splits_never_share_a_seed():
    seeds = [
        scene_seed(0, split, media, index)
        for split in ("train", "validation", "test")
        for media in ("video", "image")
        for index in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    drawn = {np.random.default_rng([*seed, 0]).integers(2**62) for seed in seeds}
    assert len(drawn) == len(seeds)


def test_same_seed_gives_the_same_bytes_however_many_processes(tmp_path, folder):
    build(tmp_path / "again", VIDEOS, IMAGES, seed=4, config=CONFIG, processes=2)
    build(tmp_path / "other", {"train": 1}, {}, seed=5, config=CONFIG)
    first, again = _files(folder), _files(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    name = "train/videos/train_000000.mp4"
    assert _files(tmp_path / "other")[name] != first[name]


def test_more_videos_keep_the_ones_before(tmp_path, folder):
    build(tmp_path / "less", {"train": 2}, {}, seed=4, config=CONFIG)
    name = "train/videos/train_000001.mp4"
    assert _files(tmp_path / "less")[name] == _files(folder)[name]


def test_finished_output_is_kept_and_another_is_not_overwritten(tmp_path, folder):
    stamp = (folder / "world.json").stat().st_mtime_ns
    build(folder, VIDEOS, IMAGES, seed=4, config=CONFIG)
    assert (folder / "world.json").stat().st_mtime_ns == stamp
    with pytest.raises(BuildError, match="seed differ"):
        build(folder, VIDEOS, IMAGES, seed=6, config=CONFIG)
    (tmp_path / "mine").mkdir()
    with pytest.raises(BuildError, match="has no world.json"):
        build(tmp_path / "mine", VIDEOS, IMAGES, seed=4, config=CONFIG)


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(out, {"train": 2}, {}, seed=0, config=CONFIG, progress=stop)
    assert not out.exists()
    build(out, {"train": 1}, {}, seed=0, config=CONFIG)
    assert len(list(out.glob("train/videos/*"))) == 1


@pytest.mark.parametrize(
    ("videos", "message"),
    [({"dev": 1}, "split 'dev'"), ({"train": -1}, "train=-1"), ({}, "both 0")],
)
def test_wrong_counts_are_refused(tmp_path, videos, message):
    with pytest.raises(BuildError, match=message):
        build(tmp_path / "out", videos, {}, seed=0, config=CONFIG)


@pytest.mark.parametrize(
    ("text", "videos", "images", "expected"),
    [
        ("train:0.8,validation:0.1,test:0.1", 10, 5, ((8, 1, 1), (4, 1, 0))),
        ("train:400,validation:60,test:160", 620, 240, ((400, 60, 160), (155, 23, 62))),
        ("train:1", 7, 0, ((7,), (0,))),
    ],
)
def test_splits_are_shares_or_numbers(text, videos, images, expected):
    found = parse_splits(text, videos, images)
    assert tuple(tuple(counts.values()) for counts in found) == expected


@pytest.mark.parametrize("text", ["train", "dev:1", "train:0.5", "train:x", "train:1,train:0"])
def test_wrong_splits_are_refused(text):
    with pytest.raises(ValueError, match="--splits"):
        parse_splits(text, 10, 0)


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--videos=2", "--images=1", "--splits=test:1", "--seconds=8"]
    assert main([*arguments, "--fps=4", "--annotation_fps=1"]) == 0
    assert len(list(out.glob("test/videos/*.mp4"))) == 2
    assert main([*arguments, "--seed=1"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--size=63"])
    assert "WorldConfig.size=63" in capsys.readouterr().err
