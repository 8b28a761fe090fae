"""Preparation as a whole: what is kept, what is left out, and what a kill leaves behind."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from media_samples import steady, write_header, write_media, write_video

from tpo_jax.data.ingest import plan as plan_lib
from tpo_jax.data.ingest.plan import PrepareError, Settings, Source, make_plan
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.records import PreparedDataset

SAMPLES = pathlib.Path(__file__).parent / "samples"
TESTS = pathlib.Path(__file__).parent


def write_native(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def question(name, **changes):
    return {"video": name, "turns": [{"question": "What?", "answer": "That."}]} | changes


@pytest.fixture
def many(tmp_path):
    """(media folder, annotation file) of twelve short videos, cut into pieces of three."""
    media = tmp_path / "media"
    media.mkdir()
    first = write_video(media / "00.mp4", steady(1))
    names = [f"{i:02d}.mp4" for i in range(12)]
    for name in names[1:]:
        shutil.copy(first, media / name)
    return media, write_native(tmp_path / "a.jsonl", [question(name) for name in names])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(plan_lib, "PIECE_MEDIA", 3)


def contents(folder):
    """Every file of a prepared folder, by name."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def source(media, annotations, name="test", format="native"):
    return Source(media, format, annotations, name)


def test_all_formats_together(tmp_path):
    media = write_media(tmp_path / "media")
    files = {
        "videochat2": "videochat2.json",
        "qvhighlights": "qvhighlights.jsonl",
        "refcoco": "refcoco.json",
        "mevis": "mevis",
        "got10k": "got10k",
        "thumos": "thumos.json",
        "native": "native.jsonl",
    }
    sources = [source(media, SAMPLES / file, name, name) for name, file in files.items()]
    statistics = prepare(sources, tmp_path / "out", Settings(size=32), progress=False)
    assert (statistics["videos"], statistics["images"]) == (2, 1)
    assert statistics["quarantined"] == 0
    assert statistics["tasks"] == {
        **{"action": 2, "conversation": 4, "mask": 2},
        **{"region": 4, "temporal": 3, "tracking": 2},
    }
    assert statistics == json.loads((tmp_path / "out/statistics.json").read_text())
    dataset = PreparedDataset(tmp_path / "out")
    assert {e.source for v in dataset.videos for e in dataset.examples(v)} == set(files)
    assert all(e.video_id == v for v in dataset.videos for e in dataset.examples(v))
    assert dataset.frames("clip_a.mp4", [0, 7]).shape == (2, 32, 32, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["media", "out"]


def test_a_bad_file_takes_its_own_records_only(many, small_pieces, tmp_path):
    media, annotations = many
    whole = (media / "01.mp4").read_bytes()
    (media / "01.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "05.mp4").write_bytes(b"")
    write_header(media / "07.mp4")
    records = [json.loads(line) for line in annotations.read_text().splitlines()]
    records.append(question("01.mp4"))
    records.append(
        question(
            "02.mp4",
            task="temporal",
            turns=[{"question": "When?", "answer": "<temporal>"}],
            targets={"windows": [[0.5, 3]]},
        )
    )
    (media / "15.gif").write_bytes(b"GIF89a")  # whether it moves cannot be seen
    records.append(question("15.gif"))
    write_native(annotations, records)
    out = tmp_path / "out"
    statistics = prepare([source(media, annotations)], out, Settings(size=16), progress=False)
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert statistics["quarantined"] == len(quarantine) == 6
    assert statistics["examples"] == 9 and statistics["videos"] == 9
    assert sum(statistics["quarantined_by_reason"].values()) == 6
    by_record = {entry["record"]: entry for entry in quarantine}
    assert set(by_record) == {f"line {number}" for number in (2, 6, 8, 13, 14, 15)}
    for entry in quarantine:
        assert set(entry) == {"file", "record", "field", "value", "reason", "fix"}
        assert entry["file"] == str(annotations) and entry["reason"] and entry["fix"]
    assert "01.mp4" in by_record["line 2"]["value"] and by_record["line 13"]["field"] == "video"
    assert "0 bytes" in by_record["line 6"]["reason"]
    assert "it has no frame" in by_record["line 8"]["reason"]
    assert "not a readable image" in by_record["line 15"]["reason"]
    assert by_record["line 14"]["field"] == "targets.windows[0]"
    assert "1.000 s" in by_record["line 14"]["reason"]
    dataset = PreparedDataset(out)
    assert {"01.mp4", "05.mp4", "07.mp4"}.isdisjoint(dataset.videos)
    for video_id in dataset.videos:  # rows of later pieces are not shifted by what is missing
        assert dataset.frames(video_id, [1]).shape == (1, 16, 16, 3)
        assert [e.video_id for e in dataset.examples(video_id)] == [video_id]


def test_processes_do_not_change_the_result(many, small_pieces, tmp_path):
    sources = [source(*many)]
    for processes in (1, 2):
        prepare(sources, tmp_path / f"out{processes}", Settings(), processes, progress=False)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


KILLED = """
import os, pathlib, signal, sys
from tpo_jax.data.ingest import plan, run, work
from tpo_jax.data.ingest.plan import Settings, Source

def main():
    media, annotations, out, processes = sys.argv[1:]
    plan.PIECE_MEDIA = 3
    def killed_at(function, calls):
        def counted(*arguments):
            counted.calls += 1
            if counted.calls == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        counted.calls = 0
        return counted
    if processes == "1":
        work._encode_examples = killed_at(work._encode_examples, 8)  # in the third piece
    else:
        run.assemble = killed_at(run.assemble, 1)
    source = Source(pathlib.Path(media), "native", pathlib.Path(annotations), "test")
    run.prepare([source], pathlib.Path(out), Settings(), int(processes), progress=False)

if __name__ == "__main__":
    main()
"""


def run_killed(many, out, processes, tmp_path):
    """Runs the preparation in a process that kills itself; waits for its workers' end, too."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), *map(str, many), str(out), str(processes)]
    path = os.pathsep.join([str(TESTS.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    # Workers inherit the pipe: reading to its end waits for the last of them.
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=120)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("processes", "finished"), [(1, 2), (2, 4)])
def test_kill_and_resume(many, small_pieces, tmp_path, processes, finished):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run_killed(many, out, processes, tmp_path)
    assert not out.exists()  # nothing half-written carries the name
    parts = tmp_path / "out.partial" / "parts"
    done = {p.name: p for p in parts.iterdir() if not p.name.startswith("writing-")}
    assert len(done) == finished
    inodes = {(p / "clips").stat().st_ino for p in done.values()}
    prepare([source(*many)], out, Settings(), progress=False)
    prepare([source(*many)], whole, Settings(), progress=False)
    assert contents(out) == contents(whole)
    shards = [p for p in (out / "clips/1.0.0").iterdir() if "array_record" in p.name]
    assert inodes <= {p.stat().st_ino for p in shards}  # finished work was taken, not redone
    assert len(PreparedDataset(out)) == 12
    assert not (tmp_path / "out.partial").exists()


def test_changed_file_redoes_its_piece_only(many, small_pieces, tmp_path):
    out = tmp_path / "out"
    run_killed(many, out, 1, tmp_path)
    parts = tmp_path / "out.partial" / "parts"
    before = {p.name for p in parts.iterdir()}
    write_video(many[0] / "04.mp4", steady(2))  # in the second of two finished pieces
    plan = make_plan([source(*many)], Settings())
    assert [piece.key in before for piece in plan.pieces] == [True, False, False, False]
    prepare([source(*many)], out, Settings(), progress=False)
    assert PreparedDataset(out).video_info("04.mp4").num_frames == 4


def test_finished_folder_is_recognised(many, tmp_path):
    out = tmp_path / "out"
    first = prepare([source(*many)], out, Settings(), progress=False)
    stamp = (out / "index.jsonl").stat().st_mtime_ns
    assert prepare([source(*many)], out, Settings(), progress=False) == first
    assert (out / "index.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(PrepareError, match="other media, annotations or settings"):
        prepare([source(*many)], out, Settings(fps=4), progress=False)
    with pytest.raises(PrepareError, match="not a prepared folder"):
        prepare([source(*many)], many[0], Settings(), progress=False)


def test_two_runs_at_once_are_refused(many, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PrepareError, match="another process"):
            prepare([source(*many)], tmp_path / "out", Settings(), progress=False)


def test_nothing_usable_is_an_error(many, tmp_path):
    media, annotations = many
    for video in media.iterdir():
        video.write_bytes(b"")
    with pytest.raises(PrepareError, match="(?s)all 12 records are in quarantine.*0 bytes"):
        prepare([source(media, annotations)], tmp_path / "out", Settings(), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "media"]
    write_native(annotations, [question("nowhere.mp4")])
    with pytest.raises(PrepareError, match="(?s)no usable record.*unknown video"):
        prepare([source(media, annotations)], tmp_path / "out", Settings(), progress=False)


def test_duplicate_ids_are_quarantined(many, tmp_path):
    media, annotations = many
    write_native(
        annotations, [question("00.mp4", example_id="x"), question("01.mp4", example_id="x")]
    )
    statistics = prepare([source(media, annotations)], tmp_path / "out", Settings(), progress=False)
    assert statistics["examples"] == 1
    (entry,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert entry["field"] == "example_id" and "line 1" in entry["reason"]


def test_two_media_folders(many, tmp_path):
    other = write_media(tmp_path / "other")
    shutil.copy(other / "clip_a.mp4", other / "00.mp4")
    extra = write_native(tmp_path / "b.jsonl", [question("00.mp4")])
    sources = [source(*many), source(other, extra, "second")]
    prepare(sources, tmp_path / "out", Settings(), progress=False)
    dataset = PreparedDataset(tmp_path / "out")
    assert "media/00.mp4" in dataset.videos and "other/00.mp4" in dataset.videos
    assert dataset.video_info("media/00.mp4").duration == pytest.approx(1)
    assert dataset.video_info("other/00.mp4").duration == pytest.approx(4)


def test_frame_settings(many, tmp_path):
    for settings, shape in [(Settings(fps=4, size=20), (20, 20)), (Settings(fps=8), (48, 64))]:
        out = tmp_path / f"out{settings.fps}"
        prepare([source(*many)], out, settings, progress=False)
        info = PreparedDataset(out).video_info("00.mp4")
        assert (info.height, info.width) == shape
        np.testing.assert_allclose(info.timestamps, np.arange(settings.fps) / settings.fps)
    for bad in ({"fps": 0}, {"size": -1}, {"encoding": "png"}):
        with pytest.raises(PrepareError, match=next(iter(bad))):
            Settings(**bad)
