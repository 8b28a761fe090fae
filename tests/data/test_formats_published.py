"""The samples of the published formats as they should be read (see also test_formats)."""

import json
import shutil

import numpy as np
import pytest
import yaml
from format_samples import FILES, SAMPLES, read, read_sample
from media_samples import write_pictures, write_published_media
from pycocotools import mask as coco_mask

from tpo_jax import prepare
from tpo_jax.data import formats
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.records import PreparedDataset, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published_media(tmp_path_factory.mktemp("published") / "media")


@pytest.fixture
def media(folder):
    return MediaFolder(folder)


def test_llava(media):
    a, b, c = read_sample("llava", media, "llava.json")
    assert (a.media, a.task, a.video_id) == ("image", "conversation", "still.png")
    assert a.turns[0] == Turn("Which colour is the shape?", "Red.")
    assert a.turns[1] == Turn("Is it round?", "No, it is a rectangle.")
    assert (b.media, b.video_id) == ("video", "clip_a.mp4")
    assert b.turns[0].question == "Answer in one sentence.\nDescribe the video."
    assert (c.media, c.turns[0].question) == ("image", "What is shown?")


def test_llava_mixture(media, tmp_path):
    examples = read_sample("llava", media)
    # 34 % of 3, rounded up; two at random; the last; all.
    assert [e.example_id.split("datasets[")[1][0] for e in examples] == list("00112333")
    assert "llava.json 0" in examples[0].example_id and "llava.json 1" in examples[1].example_id
    assert "frame 4" in examples[4].turns[0].question
    shutil.copytree(SAMPLES, tmp_path / "samples")
    file = tmp_path / "samples" / "llava.yaml"
    assert read("llava", file, media)[0] == examples  # wherever it lies
    mixture = yaml.safe_load(file.read_text())
    drawn = set()
    for seed in range(6):
        file.write_text(yaml.safe_dump(mixture | {"seed": seed}))
        found, problems = read("llava", file, media)
        assert problems == []
        drawn.add(tuple(e.turns[0].question for e in found[2:4]))
    assert len(drawn) > 2 and all(list(pair) == sorted(pair) for pair in drawn)


@pytest.mark.parametrize(
    ("entry", "field", "reason"),
    [
        ({"json_path": "../llava.json"}, "datasets[0].json_path", "leaves"),
        ({"json_path": "/mnt/llava.json"}, "datasets[0].json_path", "leaves"),
        ({"json_path": "link.json"}, "datasets[0].json_path", "leads out"),
        ({"json_path": "absent.json"}, "", "does not exist"),
        ({"json_path": "llava.json", "sampling": "all"}, "datasets[0].sampling", "unknown key"),
        (
            {"json_path": "llava.json", "sampling_strategy": "some:3"},
            *("datasets[0].sampling_strategy", "first:N"),
        ),
    ],
)
def test_bad_mixture(entry, field, reason, media, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(SAMPLES / "llava.json", tmp_path / "in")
    (tmp_path / "outside.json").write_text("[]")
    (tmp_path / "in" / "link.json").symlink_to(tmp_path / "outside.json")
    file = tmp_path / "in" / "mixture.yaml"
    file.write_text(yaml.safe_dump({"datasets": [entry, {"json_path": "llava.json"}]}))
    examples, problems = read("llava", file, media)
    assert [p.field for p in problems] == [field] and reason in problems[0].reason
    assert problems[0].record == "datasets[0]" and len(examples) == 3
    file.write_text("datasets: !!python/object/apply:os.getcwd []")
    (problem,) = read("llava", file, media)[1]
    assert "not YAML" in problem.reason  # nothing in a mixture is run


@pytest.mark.parametrize(
    ("record", "field", "reason"),
    [
        ({"image": ["a.png", "b.png"]}, "image", "2 files"),
        ({"image": None}, "image, video", "text alone"),
        ({"video": "clip_a.mp4"}, "image, video", "both"),
        ({"conversations": []}, "turns", "at least one"),
        ({"conversations": [("gpt", "a"), ("human", "q")]}, "conversations[0].from", "human"),
        ({"conversations": [("human", "q")]}, "conversations", "no answer"),
        ({"conversations": [("human", "<image>"), ("gpt", "a")]}, "conversations[0].value", "text"),
        (
            {"conversations": [("human", "<image> or <image>?"), ("gpt", "a")]},
            *("conversations[0].value", "several images"),
        ),
        ({"conversations": [("human", "q"), ("robot", "a")]}, "conversations[1].from", "gpt"),
    ],
)
def test_bad_conversation(record, field, reason, media, tmp_path):
    good = {"id": "1", "image": "still.png", "conversations": [("human", "q"), ("gpt", "a")]}
    good |= record
    good["conversations"] = [{"from": f, "value": v} for f, v in good["conversations"]]
    (tmp_path / "a.json").write_text(json.dumps([good]))
    examples, (problem,) = read("llava", tmp_path / "a.json", media)
    assert examples == [] and problem.field == field and reason in problem.reason


def test_sharegpt4v(media):
    a, b = read_sample("sharegpt4v", media)
    assert a.turns[0].question == "Write a detailed description of the picture."
    assert (a.turns[0].kind, [t.kind for t in b.turns]) == ("caption", ["", ""])


def test_charades_sta(media):
    a, b = read_sample("charades_sta", media)
    assert (a.video_id, a.targets) == ("clip_a.mp4", {"windows": [[0.5, 3.0]]})
    assert '"a person puts a book on a shelf"' in a.turns[0].question
    assert b.turns[0].answer.count("<temporal>") == 1


def test_activitynet_captions(media):
    a, b, c = read_sample("activitynet_captions", media)
    assert a.targets == {"windows": [[0.28, 3.9]]} and '"The coach helps"' in b.turns[0].question
    assert (c.video_id, c.targets) == ("clip_b.mp4", {"windows": [[0, 4]]})


def test_tacos_counts_frames(media):
    a, b = read_sample("tacos", media)  # clip_a.avi is there as clip_a.mp4
    assert (a.video_id, a.targets, b.targets) == (
        *("clip_a.mp4", {"windows": [[1, 3]]}),
        {"windows": [[0, 2]]},
    )


def test_didemo_takes_what_most_people_chose(media):
    a, b = read_sample("didemo", media)
    assert (a.video_id, b.video_id) == ("clip_a.mp4", "clip_b.mp4")
    assert a.targets == {"windows": [[0, pytest.approx(4.0)]]}  # the video is shorter than a piece
    (again, _), problems = read("didemo", SAMPLES / "didemo.json", None)
    assert problems == [] and again.targets == {"windows": [[0, 5]]}


def test_hirest(media):
    moment, twist, pull = read_sample("hirest", media)  # clip_b is relevant as a whole
    assert moment.targets == {"windows": [[1, 3]]} and '"Tie a bow"' in moment.turns[0].question
    assert twist.targets == {"windows": [[1, 2]]} and '"Twist the' in twist.turns[0].question
    assert pull.targets == {"windows": [[2, 3]]}


def test_nlq_reads_clips_or_parts_of_the_video(media):
    a, b = read_sample("nlq", media)
    assert (a.video_id, a.start, a.targets) == ("clip_a.mp4", 0, {"windows": [[1, 2.5]]})
    assert (b.video_id, b.start, b.end) == ("clip_b.mp4", 1, 3)
    assert b.targets == {"windows": [[1.5, 2.5]]}


def test_nextgqa(media):
    question, evidence, other = read_sample("nextgqa", media)
    assert question.task == "conversation" and question.turns[0].answer == "unwrap it"
    assert len(question.turns[0].options) == 5 and question.turns[0].kind == "CW"
    assert evidence.targets == {"windows": [[0.5, 1.5], [2, 3.5]]}
    assert "why did the boy move to the sofa?" in evidence.turns[0].question
    assert other.turns[0].question == "what, if anything, did the dog do?"  # no evidence


@pytest.mark.parametrize("name", ["val", "test", "mine", "train"])
def test_a_nextgqa_file_without_its_evidence_is_told_unless_it_is_for_training(
    name, media, tmp_path
):
    shutil.copy(SAMPLES / "nextgqa" / "val.csv", tmp_path / f"{name}.csv")
    examples, problems = read("nextgqa", tmp_path / f"{name}.csv", media)
    assert [example.task for example in examples] == ["conversation"] * 2
    if name == "train":
        assert problems == []
    else:
        (problem,) = problems
        assert problem.record == f"gsub_{name}.json" and "evidence is missing" in problem.reason
        assert str(tmp_path / problem.record) in problem.fix


def test_nextgqa_windows_that_begin_a_little_early_are_cut(media, tmp_path):
    shutil.copytree(SAMPLES / "nextgqa", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "gsub_val.json"
    data = json.loads(file.read_text())
    for start, cut in ((-0.2, [[0, 1.5]]), (-0.25, None), (-1.0, None)):
        data["clip_a"]["location"]["1"] = [[start, 1.5]]
        file.write_text(json.dumps(data))
        examples, problems = read("nextgqa", tmp_path / "val.csv", media)
        windows = [e.targets["windows"] for e in examples if e.task == "temporal"]
        assert windows == ([cut] if cut else []) and len(problems) == (cut is None)


def test_refcoco_release_and_conversions_agree(media):
    (release,) = read_sample("refcoco", media, "refcoco_release")
    assert '"red corner"' in release.turns[0].question and release.media == "image"
    assert release.targets == {"boxes": [[0.1, 0.25, 0.6, 0.75]], "times": [0]}
    (named,) = read_sample("refcoco", media, "refcoco_release/refs(unc).json")
    assert named == release
    mdetr, again = read_sample("refcoco_mdetr", media)
    shikra, whole = read_sample("refcoco_shikra", media)
    for other in (mdetr, shikra):
        assert (other.turns, other.targets) == (release.turns, release.targets)
    assert '"the corner"' in again.turns[0].question
    assert whole.targets["boxes"] == [[0, 0, 1, 1]]
    shares = read_sample("refcoco_shikra", media, "refcoco_shikra_shares.jsonl")
    assert [(e.turns, e.targets) for e in shares] == [
        (e.turns, e.targets) for e in (shikra, whole)
    ]


def test_a_shikra_file_is_in_pixels_or_in_shares(media, tmp_path):
    lines = [json.loads(line) for line in (SAMPLES / "refcoco_shikra.jsonl").open()]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, lines[0] | {"bbox": [0.1, 0.2, 0.6, 1]}])))
    examples, (problem,) = read("refcoco_shikra", file, media)
    assert len(examples) == 2 and (problem.record, problem.field) == ("line 3", "bbox")
    assert "other boxes of the file are in pixels" in problem.reason
    for box in ([0.6, 0.2, 0.1, 0.9], [-0.2, 0.1, 0.6, 0.9]):  # a file of shares
        file.write_text(json.dumps(lines[0] | {"bbox": box}))
        examples, (problem,) = read("refcoco_shikra", file, media)
        assert examples == [] and problem.field == "bbox"


def test_refcoco_pickle_is_never_loaded(media, tmp_path):
    """The error says how to convert it; the command in it makes what the reader reads."""
    ran = tmp_path / "ran"
    refs = json.loads((SAMPLES / "refcoco_release" / "refs(unc).json").read_text())

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    import pickle
    import subprocess
    import sys

    shutil.copy(SAMPLES / "refcoco_release" / "instances.json", tmp_path)
    file = tmp_path / "refs(unc).p"
    file.write_bytes(pickle.dumps(Evil()))
    for path in (file, tmp_path):
        examples, (problem,) = read("refcoco", path, media)
        assert examples == [] and "pickle" in problem.reason and not ran.exists()
    file.write_bytes(pickle.dumps(refs))
    command = problem.fix.split("python -c ")[1]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True)
    assert len(read("refcoco", tmp_path, media)[0]) == 1


def test_visual_genome(media):
    a, b = read_sample("visual_genome", media)
    assert (a.video_id, a.media, a.task) == ("1.png", "image", "region")
    assert a.targets == {"boxes": [[0.1, 0.25, 0.6, 0.75]], "times": [0]}
    assert b.targets["boxes"] == [[0.5, 0, 1, 1]] and '"grey wall"' in b.turns[0].question


def test_as_v2_takes_the_padding_off(media, tmp_path):
    relations, talk = read_sample("as_v2", media)
    assert relations.turns == (
        Turn(
            "Describe the relations.",
            "A shape <region> is left of two walls <region> <region>.",
            kind="region",
        ),
    )
    shape, wall, again = relations.targets["boxes"]
    np.testing.assert_allclose(shape, [0.1, 0.25, 0.6, 0.75], atol=2e-3)
    np.testing.assert_allclose(wall, [0.6, 0, 1, 1], atol=2e-3)
    assert wall == again and relations.targets["times"] == [0, 0, 0]
    assert talk.task == "conversation"
    assert talk.turns == (Turn("What is this region [0.10, 0.25, 0.60, 0.75]?", "a red shape"),)
    plain = tmp_path / "as_v2_wo_square_pad.json"
    plain.write_text((SAMPLES / "as_v2.json").read_text())
    (relations, _), problems = read("as_v2", plain, media)
    assert problems == []
    np.testing.assert_allclose(relations.targets["boxes"][0], np.array([100, 375, 599, 624]) / 999)


def decode(rle):
    return coco_mask.decode(dict(rle))


def test_ref_youtube_vos(media):
    corner, once = read_sample("ref_youtube_vos", media)
    assert corner.task == "mask" and corner.video_id == "fifth" and corner.media == "video"
    np.testing.assert_allclose(corner.targets["times"], [0, 5 / 30, 10 / 30])
    assert decode(corner.targets["rles"][2])[:24, 2:34].all()
    assert [decode(r).sum() for r in corner.targets["rles"]] == [768, 768, 768]
    assert [r is None for r in once.targets["rles"]] == [True, False, True]


def test_davis(media):
    first, second = read_sample("davis", media)  # and no example of the void pixels
    assert [e.example_id for e in (first, second)] == ["test/strip/1", "test/strip/2"]
    np.testing.assert_allclose(first.targets["times"], [0, 1 / 24, 2 / 24])
    assert first.targets["input_box"] == [0, 0, 0.5, 0.5]
    assert second.targets["boxes"][0] is None and second.targets["rles"][0] is None
    assert second.targets["input_box"] == [40 / 64, 30 / 48, 50 / 64, 40 / 48]
    assert read_sample("davis", media, "davis/ImageSets/2017/train.txt") == [first, second]


def test_names_in_a_davis_list_stay_inside(media, tmp_path):
    shutil.copytree(SAMPLES / "davis", tmp_path / "davis")
    file = tmp_path / "davis" / "ImageSets" / "2017" / "train.txt"
    file.write_text("strip\n../../ImageSets\nabsent\n")
    examples, problems = read("davis", file, media)
    assert len(examples) == 2 and [p.value for p in problems[:1]] == ["../../ImageSets"]
    assert "leaves" in problems[0].reason


def test_sa_v(media):
    first, second = read_sample("sa_v", media)
    assert first.task == "tracking" and first.video_id == "clip_a.mp4"
    assert first.targets["times"] == [0, 0.5, 1.0]  # every fourth frame of 8 a second
    assert first.targets["boxes"][1] == [2 / 64, 0, 34 / 64, 0.5]
    assert [b is None for b in second.targets["boxes"]] == [True, True, False]
    assert second.targets["rles"][0] is None  # an empty code means absent
    assert first.turns[0].question.count("<box>") == 1


def test_sa_v_validation_set(media):
    (example,) = read_sample("sa_v", media, "sa_v_val")
    assert (example.example_id, example.video_id) == ("test/strip/000", "strip")
    np.testing.assert_allclose(example.targets["times"], [0, 4 / 24])
    assert example.targets["rles"][0] is None
    assert example.targets["input_box"] == [10 / 64, 20 / 48, 20 / 64, 30 / 48]


def test_lasot(media):
    (a,) = read_sample("lasot", media)
    assert a.video_id == "shape-1/img" and a.targets["boxes"][2] is None
    np.testing.assert_allclose(a.targets["times"], np.arange(4) / 30)
    assert a.targets["boxes"][3] == [60 / 64, 0, 1, 1 / 3]  # cut at the border of the frame
    assert a.targets["size"] == [48, 64]
    assert "wall" not in a.turns[0].question


@pytest.mark.parametrize("name", ["full_occlusion.txt", "out_of_view.txt"])
def test_a_lasot_sequence_without_a_file_of_absence_is_a_problem(name, media, tmp_path):
    shutil.copytree(SAMPLES / "lasot", tmp_path / "lasot")
    file = tmp_path / "lasot" / "shape" / "shape-1" / name
    file.unlink()
    examples, (problem,) = read("lasot", tmp_path / "lasot", media)
    assert examples == [] and (problem.record, problem.field) == ("shape/shape-1", name)
    assert "the file is missing" in problem.reason and str(file) in problem.fix


@pytest.mark.parametrize("pictures", [3, 4, 5])
@pytest.mark.parametrize("name, video", [("lasot", "shape-1/img"), ("got10k", "clip_a")])
def test_a_track_has_a_box_for_every_picture(name, video, pictures, tmp_path):
    """The samples have four; a video file is not counted, whose rate need not be that of boxes."""
    write_pictures(tmp_path / video, [f"{i:08d}.png" for i in range(1, pictures + 1)])
    examples, problems = read(name, SAMPLES / FILES[name], MediaFolder(tmp_path))
    assert len(examples) == (pictures == 4)
    assert [(p.field, p.value) for p in problems] == [("groundtruth.txt", 4)] * (pictures != 4)
    assert all(f"4 boxes, but the video has {pictures} pictures" in p.reason for p in problems)


def test_got10k_and_mevis_on_folders_of_pictures(tmp_path):
    write_pictures(tmp_path / "clip_a", [f"{i:08d}.png" for i in range(1, 5)])
    media = MediaFolder(tmp_path)
    ((example,), problems) = read("got10k", SAMPLES / "got10k", media)
    assert problems == [] and (example.video_id, media.frame_rate("clip_a")) == ("clip_a", 2)
    (tmp_path / "m").mkdir()
    meta = json.loads((SAMPLES / "mevis" / "meta_expressions.json").read_text())
    del meta["videos"]["clip_a"]["fps"]  # as in the release
    (tmp_path / "m" / "meta_expressions.json").write_text(json.dumps(meta))
    shutil.copy(SAMPLES / "mevis" / "mask_dict.json", tmp_path / "m")
    _, problems = read("mevis", tmp_path / "m", MediaFolder(tmp_path))
    assert len(problems) == 2 and "--frame_rate" in problems[0].fix
    examples, problems = read("mevis", tmp_path / "m", MediaFolder(tmp_path), frame_rate=5)
    assert problems == [] and examples[0].targets["times"] == [0, 0.2, 0.4]
    command = ["--format=mevis", f"--annotations={tmp_path / 'm'}", f"--media={tmp_path}"]
    assert prepare.main(["check", *command]) == 1
    assert prepare.main(["check", *command, "--frame_rate=5"]) == 0
    out = tmp_path / "out"
    assert prepare.main(["run", *command, "--frame_rate=5", f"--out={out}", "--fps=50"]) == 0
    info = PreparedDataset(out).video_info("clip_a")
    np.testing.assert_allclose(info.timestamps, [0, 0.2, 0.4, 0.6], rtol=1e-6)


def test_links_in_a_folder_of_pictures_do_not_lead_out(tmp_path):
    inside = write_pictures(tmp_path / "in" / "strip", ["00000.png", "00001.png"])
    (tmp_path / "secret.png").write_bytes((inside / "00001.png").read_bytes())
    (inside / "00002.png").symlink_to(tmp_path / "secret.png")
    examples, problems = read("davis", SAMPLES / "davis", MediaFolder(tmp_path / "in"))
    assert examples == [] and all("leads out" in p.reason for p in problems)


def test_round_trip_through_prepare(folder, tmp_path, capsys):
    """All samples in one run of the command, and what was read is what was written."""
    world, out = tmp_path / "world", tmp_path / "out"
    shutil.copytree(SAMPLES, world)
    shutil.copytree(folder, world / "media")
    listed = [{"format": name, "path": file} for name, file in FILES.items()]
    manifest = {"name": "all", "media": "media", "annotations": listed}
    (world / "dataset.json").write_text(json.dumps(manifest))
    assert prepare.main(["run", "--data", str(world), "--out", str(out), "--size", "16"]) == 0
    assert "quarantined              0" in capsys.readouterr().out
    dataset = PreparedDataset(out)
    written = {e.example_id: e for v in dataset.videos for e in dataset.examples(v)}
    media = MediaFolder(folder)
    for name in FILES:
        expected, _ = read(name, SAMPLES / FILES[name], media)
        assert expected
        for example in expected:
            key = example.example_id.replace("test/", f"all/{name}/", 1)
            found = written.pop(key)
            assert (found.turns, found.task, found.media) == (
                *(example.turns, example.task),
                example.media,
            )
            assert json.dumps(found.targets) == json.dumps(example.targets)
    assert written == {}
    # Folders of pictures keep the times of their own rate: 30 a second, names count by five.
    info = dataset.video_info("fifth")
    assert (info.num_frames, info.duration) == (1, pytest.approx(0.5))
    assert dataset.video_info("strip").duration == pytest.approx(3 / 24)


def test_check_command_on_a_damaged_file(folder, tmp_path, capsys):
    data = json.loads((SAMPLES / "activitynet_captions.json").read_text())
    data["clip_a"]["timestamps"][0] = [3, 1]
    data["clip_b"]["split"] = "train"
    file = tmp_path / "train.json"
    file.write_text(json.dumps(data))
    command = ["check", "--format=activitynet_captions", f"--annotations={file}"]
    assert prepare.main([*command, "--media", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert f"{file} [clip_a/0]: timestamps[0]: [3, 1]: expected start < end" in printed
    assert f"{file} [clip_b]: split: 'train': unknown key" in printed
    assert "1 valid examples, 2 problems" in printed and "temporal 1" in printed
    assert "split: unknown key 1, timestamps: expected start < end 1" in printed


def test_check_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["check", "--help"])
    printed = capsys.readouterr().out
    for form in formats.FORMATS.values():
        assert f"\n  {form.name}" in printed and form.description in printed
