"""Splits that are published without labels: read where that is said, and never trained on."""

import json
import shutil

import numpy as np
import pytest
from fake_dataset import FakeDataset, example, video_info
from format_samples import FILES, SAMPLES, UNLABELLED, read
from media_samples import write_published_media
from small_pipeline import HEADS, VIDEO

from tpo_jax import prepare
from tpo_jax.data.evaluation_rows import count_unlabelled
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.ingest.statistics import count_examples
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import PreparedDataset, Turn
from tpo_jax.data.rows import RowError
from tpo_jax.data.targets import TARGETS, View, slot_target

QUARTER = [0.25, 0.25, 0.75, 0.75]
EXPECTED = {
    "mevis": ("mask", {"times": [0, 0.125, 0.25], "frames": [0, 1, 2]}),  # 8 frames a second
    "ref_youtube_vos": ("mask", {"times": [0, 1 / 6], "frames": [5, 10]}),
    "davis": ("tracking", {
        "times": [0, 1 / 24, 2 / 24], "frames": [0, 1, 2], "input_box": [0, 0, 0.5, 0.5]}),
    "got10k": ("tracking", {
        "times": [0, 0.1, 0.2], "frames": [0, 1, 2], "input_box": QUARTER}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published_media(tmp_path_factory.mktemp("unlabelled") / "media")


def read_split(name, folder, path=None, **options):
    """With the frame rate that GOT-10k does not say."""
    media = MediaFolder(folder) if folder else None
    options = {"frame_rate": 10 if name == "got10k" else None, "unlabelled": True} | options
    return read(name, path or SAMPLES / UNLABELLED[name], media, **options)


@pytest.mark.parametrize("name", UNLABELLED)
def test_frames_and_the_start_of_a_track_are_read(name, folder):
    examples, problems = read_split(name, folder)
    task, targets = EXPECTED[name]
    assert problems == [] and len(examples) == (2 if name == "mevis" else 1)
    one = examples[0]
    assert one.targets == targets | {"unlabelled": True, "size": [48, 64]}
    assert one.task == task and not one.labelled
    assert one.turns[0].answer.count("<mask>") == 1
    assert count_examples(examples)["unlabelled"] == len(examples)
    assert count_examples(examples)["masks"] == 0 and count_examples(examples)["boxes"] == 0


@pytest.mark.parametrize(
    ("name", "field", "reason"),
    [("mevis", "mask_dict.json", "the labels are missing"),
     ("ref_youtube_vos", "", "there are no masks"),
     ("davis", "masks", "the labels are missing"),
     ("got10k", "groundtruth.txt", "the labels are missing")],
)  # fmt: skip
def test_labels_that_are_missing_are_a_problem_unless_it_is_said(name, field, reason, folder):
    examples, (problem,) = read_split(name, folder, unlabelled=False)
    assert examples == [] and problem.field == field and reason in problem.reason
    assert "published without labels say --unlabelled" in problem.fix


def test_expressions_without_an_object_are_a_problem_unless_it_is_said(folder, tmp_path):
    for name, file in (("mevis", "meta_expressions.json"), ("ref_youtube_vos", "a.json")):
        shutil.copytree((SAMPLES / FILES[name]).parents[0 if name == "mevis" else 2],
                        tmp_path, dirs_exist_ok=True)  # fmt: skip
        lost = json.loads((SAMPLES / UNLABELLED[name] / file if name == "mevis" else
                           SAMPLES / UNLABELLED[name]).read_text())  # fmt: skip
        target = tmp_path / ("mevis" if name == "mevis" else "train") / file
        target.write_text(json.dumps(lost))
        examples, problems = read_split(name, folder, target, unlabelled=False)
        field = {"mevis": "anno_id", "ref_youtube_vos": "obj_id"}[name]
        assert examples == [] and {p.field for p in problems} == {field}
        assert all("labels are missing" in p.reason for p in problems)


@pytest.mark.parametrize("name", UNLABELLED)
def test_labels_that_are_there_are_a_problem_where_it_is_said(name, folder):
    examples, problems = read_split(name, folder, SAMPLES / FILES[name])
    assert examples == [] and problems
    for problem in problems:
        assert "it has labels" in problem.reason and "leave --unlabelled out" in problem.fix


@pytest.mark.parametrize("name", ["ref_youtube_vos", "davis", "got10k"])
def test_without_media_it_is_said_what_is_missing(name):
    examples, (problem,) = read_split(name, None)
    assert examples == [] and "--media" in problem.fix


def test_where_a_track_begins_is_held_against_the_pictures(folder, tmp_path):
    shutil.copytree(SAMPLES / "davis_test_dev", tmp_path / "d")
    masks = tmp_path / "d/Annotations/480p/strip"
    (masks / "00000.png").rename(masks / "00001.png")
    _, (problem,) = read_split("davis", folder, tmp_path / "d")
    assert (problem.field, problem.value) == ("masks", "00001.png")
    assert "the first picture of the video is number 0" in problem.reason
    shutil.copytree(SAMPLES / "got10k_test/strip", tmp_path / "g/clip_a")
    _, (problem,) = read_split("got10k", folder, tmp_path / "g")
    assert "expected a folder of pictures" in problem.reason
    (tmp_path / "g/clip_a").rename(tmp_path / "g/strip")
    for text, reason in (("", "expected a list"), ("60,12,32,24", "outside the frame")):
        (tmp_path / "g/strip/groundtruth.txt").write_text(text)
        examples, (problem,) = read_split("got10k", folder, tmp_path / "g")
        assert examples == [] and problem.field == "groundtruth.txt line 1"
        assert reason in problem.reason


def about(task="mask", **changes):
    """An example without labels, as it may be written by hand."""
    targets = {"unlabelled": True, "times": [0.0, 1.0], "frames": [0, 1], "size": [48, 64]}
    question = "Follow <box>." if task == "tracking" else "Where is it?"
    marker = "<temporal>" if task == "temporal" else "<mask>"
    return example("e", "v", task, [Turn(question, f"Here: {marker}")], targets | changes)


@pytest.mark.parametrize(
    ("task", "changes", "field"),
    [
        ("mask", {"unlabelled": 1}, "targets.unlabelled"),
        ("mask", {"rles": [None, None]}, "targets.rles"),
        ("tracking", {"boxes": [None, None], "input_box": QUARTER}, "targets.boxes"),
        ("tracking", {}, "targets.input_box"),
        ("mask", {"frames": [0]}, "targets"),
        ("mask", {"frames": [0, "../1"]}, "targets.frames"),
        ("mask", {"size": [48]}, "targets.size"),
        ("mask", {"times": [0.0, 99.0]}, "targets.times[1]"),
        ("temporal", {}, "targets.unlabelled"),
    ],
)
def test_what_an_example_without_labels_may_not_have(task, changes, field):
    assert check_example(about(), 8.0) == about()
    with pytest.raises(Invalid) as caught:
        check_example(about(task, **changes), 8.0)
    assert caught.value.field == field
    several = {"each": [about().targets, about().targets]}
    with pytest.raises(Invalid, match="unknown key"):
        check_example(example("e", "v", "mask", [Turn("Both?", "<mask> <mask>")], several), 8.0)


def test_training_refuses_them_by_name(codec, model):
    dataset = FakeDataset("d", {"v": [about(), about("tracking", input_box=QUARTER)]},
                          {"v": video_info()})  # fmt: skip
    weights = {"mask": 1.0, "tracking": 1.0}
    with pytest.raises(RowError) as caught:
        Pipeline([Source(dataset, 1.0, weights)], codec, model, HEADS, [VIDEO], 0)
    assert "2 examples do not fit" in str(caught.value) and "example 'e'" in str(caught.value)
    assert str(caught.value).count("targets.unlabelled: the example has no labels to learn") == 2
    assert count_unlabelled(dataset, ("mask",)) == {"mask": 1}


def test_rows_that_ask_about_them_label_no_frame_and_draw_the_box_nearest_to_its_frame():
    view = View(0.0, 8.0, np.array([3.0, 0.5, 7.0]))
    targets = about("tracking", input_box=QUARTER).targets
    assert not TARGETS["mask"].fill(targets, 0, view, VIDEO)["labelled"].any()
    drawn = slot_target("box", "tracking").fill(targets, 0, view, VIDEO)
    assert drawn["boxes"].tolist() == QUARTER and drawn["frame"] == 1


def test_the_commands_say_it(folder, tmp_path, capsys):
    command = ["check", "--format=mevis", f"--annotations={SAMPLES / 'mevis_valid'}"]
    assert prepare.main([*command, f"--media={folder}"]) == 1
    assert "say --unlabelled" in capsys.readouterr().out
    assert prepare.main([*command, f"--media={folder}", "--unlabelled"]) == 0
    printed = capsys.readouterr().out
    assert "2 valid examples, 0 problems" in printed and "unlabelled               2\n" in printed
    lasot = ["check", "--format=lasot", f"--annotations={SAMPLES / 'lasot'}", "--unlabelled"]
    assert prepare.main(lasot) == 2
    assert capsys.readouterr().err == (
        "error: unlabelled: the format lasot reads no splits without labels, mevis, "
        "ref_youtube_vos, davis, got10k do; leave it out\n"
    )
    out = ["run", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]
    entry = {"format": "mevis", "path": "mevis_valid", "unlabelled": "yes"}
    listed = {"name": "x", "media": "media", "annotations": [entry]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    assert prepare.main(out) == 2
    assert "annotations[0].unlabelled: 'yes': expected true or false" in capsys.readouterr().err
    assert prepare.main([*out, "--unlabelled"]) == 2
    assert "--unlabelled=True: is not read beside --data" in capsys.readouterr().err


def test_a_data_set_says_it_of_its_splits(folder, tmp_path):
    labelled = {"format": "mevis", "path": "mevis"}
    kept_back = {"format": "davis", "path": "davis_test_dev", "unlabelled": True}
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "media").symlink_to(folder)
    listed = {"name": "x", "media": "media", "annotations": [labelled, kept_back]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    out = tmp_path / "out"
    assert prepare.main(["run", f"--data={tmp_path}", f"--out={out}", "--size=16"]) == 0
    dataset = PreparedDataset(out)
    assert count_unlabelled(dataset, ("mask", "tracking")) == {"tracking": 1}
    assert [e.labelled for e in dataset.examples("clip_a.mp4")] == [True, True]
    (example,) = dataset.examples("strip")
    assert example.targets["size"] == [48, 64]  # of the mask, not of the stored frames
    found = json.loads((out / "statistics.json").read_text())
    assert (found["examples"], found["unlabelled"], found["quarantined"]) == (3, 1, 0)
