"""The command line of prepare."""

import json
import pathlib
import shutil

import gcs_server
import numpy as np
import pytest
from etils import epath
from media_samples import write_media
from memory_bucket import MemoryBucket
from tokenizers import Tokenizer

from tpo_jax import prepare
from tpo_jax.data.records import PreparedDataset

SAMPLES = pathlib.Path(__file__).parent / "samples"


@pytest.fixture
def world(tmp_path):
    """A data set with a manifest."""
    folder = tmp_path / "world"
    write_media(folder / "media")
    for name in ("native.jsonl", "qvhighlights.jsonl"):
        shutil.copy(SAMPLES / name, folder / name)
    listed = [{"format": n, "path": f"{n}.jsonl"} for n in ("native", "qvhighlights")]
    manifest = {"name": "samples", "media": "media", "annotations": listed}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def test_run_on_a_manifest(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare.main(["run", "--data", str(world), "--out", str(out), "--size", "32"]) == 0
    dataset = PreparedDataset(out)
    sources = {e.source for v in dataset.videos for e in dataset.examples(v)}
    assert sources == {"samples/native", "samples/qvhighlights"}
    printed = capsys.readouterr().out
    assert "conversation 1" in printed and "temporal 3" in printed


def test_tokenizer_of_a_prepared_folder(world, tmp_path, capsys):
    data, out = tmp_path / "out", tmp_path / "new" / "tokenizer.json"
    prepare.main(["run", "--data", str(world), "--out", str(data), "--size", "32"])
    assert prepare.main(["tokenizer", "--data", str(data), "--out", str(out)]) == 0
    tokenizer = Tokenizer.from_file(str(out))
    question = PreparedDataset(data).examples(PreparedDataset(data).videos[0])[0].turns[0].question
    assert tokenizer.decode(tokenizer.encode(question).ids) == question
    assert f"{tokenizer.get_vocab_size()} tokens" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer.json"]

    assert prepare.main(["tokenizer", "--data", str(tmp_path), "--out", str(out)]) == 2
    assert "is not a prepared folder" in capsys.readouterr().err


def assert_same_data(a, b):
    assert a.videos == b.videos and a.kinds == b.kinds and len(a) > 1
    for video in a.videos:
        assert a.examples(video) == b.examples(video)
        frames = np.arange(a.video_info(video).num_frames)
        np.testing.assert_array_equal(a.frames(video, frames), b.frames(video, frames))


def test_run_into_a_bucket(world, tmp_path, monkeypatch, capsys):
    """Made in a local folder, copied; cut off once; then read by ArrayRecord's own client."""
    asked = gcs_server.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    local, out = tmp_path / "local", epath.Path("gs://bucket/data")
    run = ["run", "--data", str(world), "--out", str(out), "--size", "32"]
    assert prepare.main(run) == 2
    assert "--out=gs://bucket/data: tables are written on a disk first" in capsys.readouterr().err
    run += ["--local", str(local)]
    real, written = MemoryBucket._open, []

    def cut(self, path, mode="rb", **options):
        if "w" in mode:
            written.append(path)
            if len(written) == 4:
                with real(self, path, mode) as file:
                    file.write(b"part")
                raise OSError("the network is down")
        return real(self, path, mode, **options)

    monkeypatch.setattr(MemoryBucket, "_open", cut)
    with pytest.raises(OSError, match="network"):
        prepare.main(run)
    assert not (out / "prepared.json").exists() and (local / "prepared.json").exists()
    assert prepare.main(run) == 0
    names = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    # The one that was being written twice, and the marker of an upload.
    assert len(written) == len(names) + 2 and "uploading.json" in written[0]
    assert written[3] in written[4:] and not set(written[:3]) & set(written[4:])
    assert written[-1].endswith("/prepared.json") and not (out / "uploading.json").exists()
    assert_same_data(PreparedDataset(out), PreparedDataset(local))
    assert_same_data(PreparedDataset("gs://bucket", "data"), PreparedDataset(local))
    assert any(line.startswith("GET /storage/v1/b/bucket/o/data%2Fclips") for line in asked)
    assert prepare.main(run) == 0 and written[-1].endswith("/prepared.json")  # nothing to do

    vocabulary = ["tokenizer", "--vocabulary", "300"]
    for data, file in ((out, "gs://bucket/a/tokenizer.json"), (local, tmp_path / "tokenizer.json")):
        assert prepare.main([*vocabulary, "--data", str(data), "--out", str(file)]) == 0
    there = epath.Path("gs://bucket/a/tokenizer.json").read_text()
    assert there == (tmp_path / "tokenizer.json").read_text()
    row = ["inspect", "--data", str(out), "--out", "gs://bucket/row.html"]
    assert prepare.main(row) == 0
    assert "<html" in epath.Path("gs://bucket/row.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"world", "local", "tokenizer.json"}

    (world / "native.jsonl").write_text("")
    other = [*run[:-1], str(tmp_path / "other")]
    assert prepare.main(other) == 2
    assert "gs://bucket/data was prepared from other media" in capsys.readouterr().err
    other[4] = "gs://bucket/a"
    assert prepare.main(other) == 2
    assert "gs://bucket/a exists and is not a prepared folder" in capsys.readouterr().err


def test_what_has_to_be_local_says_so(world, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert prepare.main(["run", "--data", str(world), "--out", out, "--local", out + "2"]) == 2
    assert "means nothing without --out=gs://" in capsys.readouterr().err
    for option in ("--data", "--media", "--annotations"):
        with pytest.raises(SystemExit):
            prepare.main(["run", option, "gs://bucket/x", "--out", out])
        error = f"argument {option}: gs://bucket/x: expected a path on this machine; copy it here"
        assert error in capsys.readouterr().err
    config = ["run", "--config", "configs/prepare.py:gs://bucket/x", "--out", out]
    assert prepare.main(config) == 2
    assert "config.manifest: gs://bucket/x: expected a path on this" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"world"}


def test_run_on_a_folder_and_one_file(world, tmp_path, capsys):
    media, file = str(world / "media"), world / "native.jsonl"
    file.write_text(file.read_text() + '{"video": "nope.mp4", "turns": []}\n')
    out = tmp_path / "out"
    command = ["run", "--media", media, "--format", "native", "--annotations", str(file)]
    assert prepare.main([*command, "--out", str(out), "--encoding", "jpeg", "--fps", "4"]) == 0
    assert PreparedDataset(out).settings["encoding"] == "jpeg"
    assert PreparedDataset(out).video_info("clip_a.mp4").num_frames == 16
    assert "1 left out" in capsys.readouterr().out


def test_run_on_a_config(world, tmp_path, monkeypatch, capsys):
    config = pathlib.Path(__file__).parents[2] / "configs" / "prepare.py"
    out = tmp_path / "out"
    options = [f"--config={config}:{world}", "--config.size=16", "--config.processes=1"]
    command = ["prepare", "run", *options, "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)  # where ml_collections looks for --config.KEY
    assert prepare.main() == 0
    info = PreparedDataset(out).video_info("clip_a.mp4")
    assert (info.height, info.width, info.num_frames) == (16, 16, 8)
    monkeypatch.setattr("sys.argv", [*command, "--config.szie=3"])
    assert prepare.main() == 2
    assert "szie" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.sauces = ()", "config.sauces: ().*unknown key"),
        ("config.encoding = 'png'", "encoding: 'png'"),
        ("config.manifest = ''", "names no data"),
        ("config.sources = ({'media': 'x'},)", r"config.sources\[0\].format: None: missing"),
        (
            "config.sources = ({'media': 'x', 'format': 'davis', 'annotations': 'y', 'name': 'z', "
            "'ignore_keys': (), 'frame_rate': -1},)",
            r"config.sources\[0\].frame_rate: -1: expected a number",
        ),
        (
            "config.sources = ({'media': 'x', 'format': 'davis', 'annotations': 'y', 'name': 'z', "
            "'ignore_keys': (), 'unlabelled': 1},)",
            r"config.sources\[0\].unlabelled: 1: expected true or false",
        ),
    ],
)
def test_bad_config(body, message, world, tmp_path, capsys):
    original = pathlib.Path(__file__).parents[2] / "configs" / "prepare.py"
    config = tmp_path / "config.py"
    text = original.read_text().replace("    return config", f"    {body}\n    return config")
    config.write_text(text)
    options = [f"--config={config}:{world}", "--out", str(tmp_path / "out")]
    assert prepare.main(["run", *options]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"media": "../elsewhere"}, "leaves the media folder"),
        ({"annotations": [{"format": "native", "path": "/etc/x"}]}, "leaves the media folder"),
        ({"annotations": [{"format": "coco", "path": "x"}]}, "'coco': expected one of"),
        ({"media": "absent"}, "does not exist"),
        ({"colour": "red"}, "unknown key"),
    ],
)
def test_bad_manifest(change, message, world, tmp_path, capsys):
    manifest = json.loads((world / "dataset.json").read_text()) | change
    (world / "dataset.json").write_text(json.dumps(manifest))
    assert prepare.main(["run", "--data", str(world), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_says_which_options_are_missing(world, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert prepare.main(["run", *out]) == 2
    assert "--data, --config, or --media" in capsys.readouterr().err
    assert prepare.main(["run", "--media", str(world), *out]) == 2
    assert "--format and --annotations" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["run", "--data", str(world), *out, "--szie", "3"])
    assert "--szie" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "fix"),
    [
        ("size", "32", "give --config.size=32"),
        ("fps", "4.0", "give --config.fps=4.0"),
        ("encoding", "jpeg", "give --config.encoding=jpeg"),
        ("processes", "2", "give --config.processes=2"),
        ("ignore_keys", "a,b", "say it in config.sources"),
        ("frame_rate", "6.0", "say it in config.sources"),
    ],
)
def test_options_that_a_config_has_are_refused_beside_it(option, value, fix, tmp_path, capsys):
    command = ["run", "--config", "configs/prepare.py:world", "--out", str(tmp_path / "out")]
    assert prepare.main([*command, f"--{option}", value]) == 2
    assert capsys.readouterr().err == (
        f"error: --{option}={value}: is not read beside --config; {fix}\n"
    )
    assert not (tmp_path / "out").exists()


def test_options_that_would_change_nothing_are_refused(world, tmp_path, capsys):
    command = ["run", "--data", str(world), "--out", str(tmp_path / "out")]
    assert prepare.main([*command, "--format", "native"]) == 2
    error = "error: --format=native: is not read beside --data; say it in dataset.json\n"
    assert capsys.readouterr().err == error
    with pytest.raises(SystemExit):
        prepare.main([*command, "--config.fps=4"])
    assert "unrecognized arguments: --config.fps=4" in capsys.readouterr().err


def test_check_prints_every_invalid_record(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    lines = (SAMPLES / "qvhighlights.jsonl").read_text().splitlines()
    bad = json.loads(lines[0]) | {"relevant_windows": [[2, 9]], "qid": 9}
    file.write_text("\n".join([*lines, json.dumps(bad), "{"]))
    command = ["check", "--format", "qvhighlights", "--annotations", str(file)]
    assert prepare.main(command) == 1
    printed = capsys.readouterr().out
    assert f"{file} [line 3]: relevant_windows[0]: [2, 9]: the window goes beyond" in printed
    assert "[line 4]" in printed and "Fix:" in printed
    assert "2 valid examples, 2 problems" in printed and "temporal 2" in printed


def test_check_with_and_without_media(tmp_path, capsys):
    command = ["check", "--format", "native", "--annotations", str(SAMPLES / "native.jsonl")]
    assert prepare.main(command) == 0
    assert "5 valid examples, 0 problems" in capsys.readouterr().out
    media = write_media(tmp_path / "media")
    assert prepare.main([*command, "--media", str(media)]) == 0
    (media / "clip_b.mp4").unlink()
    assert prepare.main([*command, "--media", str(media)]) == 1
    assert "unknown video" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "check", "features", "tokenizer", "inspect"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"python -m tpo_jax.prepare {command} --" in printed
