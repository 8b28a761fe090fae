"""Files that hold several splits: none is read unasked, and what is asked for is what is read."""

import json
import shutil

import pytest
from format_samples import FILES, SAMPLES, SPLITS, read
from media_samples import write_pictures, write_published_media

from tpo_jax import prepare
from tpo_jax.data import formats
from tpo_jax.data.formats.reading import Context
from tpo_jax.data.formats.splits import WrongSplit
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.records import PreparedDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published_media(tmp_path_factory.mktemp("splits") / "media")


def refused(name, file, split=None):
    with pytest.raises(WrongSplit) as caught:
        formats.get(name).read(Context(file, "test", split=split))
    return str(caught.value)


@pytest.mark.parametrize("name", SPLITS)
def test_none_is_taken_unasked(name):
    sample, held = SPLITS[name]
    message = refused(name, SAMPLES / sample)
    assert f"{sample} holds several: " in message and "--split" in message
    for split, count in held.items():
        assert f"{split} {count} record" in message


@pytest.mark.parametrize("name", SPLITS)
def test_the_one_that_is_asked_for_is_read(name, folder):
    sample, held = SPLITS[name]
    everything = []
    for split in held:
        examples, problems = read(name, SAMPLES / sample, MediaFolder(folder), split=split)
        assert problems == [] and examples
        everything += [example.example_id for example in examples]
    assert len(set(everything)) == len(everything)
    message = refused(name, SAMPLES / sample, "trian")
    assert "split: 'trian'" in message and all(split in message for split in held)


def test_refcoco_splits(folder):
    texts = {}
    for split in ("train", "testA"):
        sample = SAMPLES / SPLITS["refcoco"][0]
        examples, _ = read("refcoco", sample, MediaFolder(folder), split=split)
        texts[split] = [example.turns[0].question for example in examples]
    assert len(texts["train"]) == 3 and texts["testA"] == ['Where is "what is red"?']


@pytest.mark.parametrize("name", [name for name, form in formats.FORMATS.items() if form.split])
def test_one_split_needs_no_word_and_may_be_named(name, folder):
    """The samples of FILES hold one or name none."""
    media = MediaFolder(folder)
    examples, problems = read(name, SAMPLES / FILES[name], media)
    assert examples and problems == []
    one = None if name in ("got10k", "lasot") else "validation" if name == "thumos" else "train"
    if one is None:
        assert "name no split" in refused(name, SAMPLES / FILES[name], "train")
    else:
        assert read(name, SAMPLES / FILES[name], media, split=one) == (examples, [])


def test_a_record_that_names_none_is_no_part_of_one(folder, tmp_path):
    data = json.loads((SAMPLES / "refcoco_splits.json").read_text())
    del data["refs"][0]["split"]
    data["refs"][3]["split"] = ["testA"]
    file = tmp_path / "refs.json"
    file.write_text(json.dumps(data))
    examples, problems = read("refcoco", file, MediaFolder(folder), split="train")
    assert [example.example_id for example in examples] == ["test/ref2/0"]
    assert [(p.record, p.field) for p in problems] == [("ref 1", "split"), ("ref 4", "split")]
    assert "names none" in problems[0].reason and "the name of a split" in problems[1].reason
    assert "none named 1 record, train 1 record, val 1 record" in refused("refcoco", file)


def test_nlq_says_it_of_a_video_or_of_the_file(folder, tmp_path):
    data = json.loads((SAMPLES / "nlq.json").read_text()) | {"split": "val"}
    del data["videos"][0]["split"]
    file = tmp_path / "nlq.json"
    file.write_text(json.dumps(data))
    assert "train 1 record, val 1 record" in refused("nlq", file)
    for split, video in (("val", "clip_a.mp4"), ("train", "clip_b.mp4")):
        examples, problems = read("nlq", file, MediaFolder(folder), split=split)
        assert problems == [] and [e.video_id for e in examples] == [video]


def test_sa_v_says_it_in_each_json(tmp_path):
    data = json.loads((SAMPLES / "sa_v" / "clip_a_manual.json").read_text())
    for name, split in (("a", "train"), ("b", "val")):
        (tmp_path / f"{name}.json").write_text(json.dumps(data | {"video_split": split}))
    assert "train 2 records, val 2 records" in refused("sa_v", tmp_path)
    examples, problems = read("sa_v", tmp_path, None, split="val")
    assert problems == [] and [e.example_id for e in examples] == ["test/b/0", "test/b/1"]


def test_davis_has_lists(folder, tmp_path):
    """test-dev beside train: its masks are of the first frame, so it is read without labels."""
    root = tmp_path / "DAVIS"
    shutil.copytree(SAMPLES / "davis", root)
    shutil.copytree(SAMPLES / "davis_test_dev", tmp_path / "other")
    shutil.copytree(tmp_path / "other/Annotations/480p/strip", root / "Annotations/480p/kept")
    (root / "ImageSets/2017/test-dev.txt").write_text("kept\n")
    media = tmp_path / "media"
    write_pictures(media / "kept", [f"{i:05d}.png" for i in range(3)])
    shutil.copytree(folder / "strip", media / "strip")
    media = MediaFolder(media)
    assert "test-dev 1 record, train 2 records" in refused("davis", root)
    examples, problems = read("davis", root, media, split="train")
    assert problems == [] and {e.video_id for e in examples} == {"strip"}
    kept, problems = read("davis", root, media, split="test-dev", unlabelled=True)
    assert problems == [] and [e.video_id for e in kept] == ["kept"]
    listed = root / "ImageSets/2017/train.txt"
    assert read("davis", listed, media) == (examples, [])
    assert "train.txt holds train 2 records" in refused("davis", listed, "test-dev")


def test_got10k_says_it_in_the_names_of_sequences(tmp_path):
    for name in ("train/GOT-10k_Train_000001", "val/GOT-10k_Val_000001"):
        shutil.copytree(SAMPLES / "got10k" / "clip_a", tmp_path / name)
    assert "train 1 record, val 1 record" in refused("got10k", tmp_path)
    examples, problems = read("got10k", tmp_path, None, split="val")
    assert problems == []
    assert [e.example_id for e in examples] == ["test/val/GOT-10k_Val_000001"]
    assert len(read("got10k", tmp_path / "train", None)[0]) == 1


def test_lasot_has_a_list_of_what_is_tested(folder, tmp_path):
    shutil.copytree(SAMPLES / "lasot", tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "shape/shape-1", tmp_path / "shape/shape-2")
    media = tmp_path / "media"
    for number in (1, 2):
        shutil.copytree(folder / "shape-1", media / f"shape-{number}")
    media = MediaFolder(media)
    assert len(read("lasot", tmp_path / "shape", media)[0]) == 2  # nothing says what they are
    (tmp_path / "testing_set.txt").write_text("shape-2\n")
    assert "testing 1 record, training 1 record" in refused("lasot", tmp_path)
    for split, video in (("testing", "shape-2/img"), ("training", "shape-1/img")):
        examples, problems = read("lasot", tmp_path, media, split=split)
        assert problems == [] and [e.video_id for e in examples] == [video]


def test_the_commands_say_it(folder, tmp_path, capsys):
    file = SAMPLES / "refcoco_splits.json"
    source = ["--format=refcoco", f"--annotations={file}", f"--media={folder}"]
    held = f"{file} holds several: testA 1 record, train 2 records, val 1 record"
    out = tmp_path / "out"
    for command in (["check"], ["run", f"--out={out}"]):
        assert prepare.main([*command, *source]) == 2
        assert f"error: split: None: {held}" in capsys.readouterr().err
        assert prepare.main([*command, *source, "--split=test"]) == 2
        assert "error: split: 'test': " in capsys.readouterr().err and not out.exists()
    assert prepare.main(["check", *source, "--split=train"]) == 0
    assert "3 valid examples, 0 problems" in capsys.readouterr().out
    assert prepare.main(["run", *source, "--split=val", f"--out={out}", "--size=16"]) == 0
    (example,) = PreparedDataset(out).examples("still.png")
    assert example.turns[0].question == 'Where is "a red shape"?'
    didemo = ["check", "--format=didemo", f"--annotations={SAMPLES / 'didemo.json'}"]
    capsys.readouterr()
    assert prepare.main([*didemo, "--split=train"]) == 2
    assert capsys.readouterr().err == (
        "error: split: 'train': files of the format didemo hold one split each, those of nlq, "
        "refcoco, sa_v, davis, got10k, lasot, thumos may hold several; leave it out\n"
    )


def test_a_data_set_says_it_of_each_entry(folder, tmp_path, capsys):
    shutil.copytree(SAMPLES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "media").symlink_to(folder)
    command = ["run", f"--data={tmp_path}", f"--out={tmp_path / 'out'}", "--size=16"]

    def listed(*entries):
        entries = [{"format": "refcoco", "path": "refcoco_splits.json"} | e for e in entries]
        manifest = {"name": "x", "media": "media", "annotations": entries}
        (tmp_path / "dataset.json").write_text(json.dumps(manifest))
        return prepare.main(command)

    assert listed({"split": "val"}, {}) == 2
    assert "holds several" in capsys.readouterr().err
    assert listed({"split": 1}) == 2
    assert "annotations[0].split: 1: expected text" in capsys.readouterr().err
    assert prepare.main([*command, "--split=val"]) == 2
    assert "--split=val: is not read beside --data" in capsys.readouterr().err
    assert listed({"split": "val"}, {"split": "testA"}) == 0
    assert len(PreparedDataset(tmp_path / "out").examples("still.png")) == 2
