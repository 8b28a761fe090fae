"""Files on any path: whole or absent, growing, and refused where only a local one will do."""

import argparse
import os
import signal
import subprocess
import sys

import memory_bucket
import pytest
from etils import epath
from memory_bucket import MemoryBucket

from tpo_jax.data import files
from tpo_jax.data.files import Lines

KILLED = """
import os, signal
from tpo_jax.data.files import Lines
lines = Lines("grown.txt", ["kept"])
lines.append("one")
lines.append("two")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def bucket(monkeypatch):
    memory_bucket.install(monkeypatch)
    return epath.Path("gs://bucket/run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_with_its_folder(tmp_path, bucket):
    for folder in (tmp_path / "a" / "b", bucket):
        files.write(folder / "x.json", "{}")
        files.write(folder / "x.json", "\u00e9\n")
        files.write(folder / "y.png", b"\x00\xff")
        assert names(folder) == ["x.json", "y.png"]
        assert (folder / "x.json").read_bytes() == b"\xc3\xa9\n"
        assert (folder / "y.png").read_bytes() == b"\x00\xff"


def test_lines_begin_with_what_is_kept(tmp_path, bucket):
    for file in (tmp_path / "a.txt", bucket / "a.txt"):
        files.write(file, 'one\ntwo\nthr')
        lines = Lines(file, ["two"])
        assert file.read_bytes() == b"two\n"
        lines.append("three")
        lines.sync()
        assert file.read_bytes() == b"two\nthree\n"
        lines.append("four")
        lines.close()
        assert file.read_bytes() == b"two\nthree\nfour\n"
        assert names(file.parent) == ["a.txt"]


def test_lines_of_a_killed_process_are_there(tmp_path):
    root = os.getcwd()
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "grown.txt").read_text() == "kept\none\ntwo\n"


def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch):
    lines, write = Lines(tmp_path / "a.txt"), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:2]))
    lines.append("sentence")
    monkeypatch.undo()
    lines.close()
    assert (tmp_path / "a.txt").read_text() == "sentence\n"


def test_a_bucket_is_written_at_most_once_a_second_and_seldom_where_that_is_slow(
    bucket, monkeypatch
):
    now, written = [0.0], []
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    lines = Lines(bucket / "a.txt")
    real = MemoryBucket._open

    def slow(self, path, mode="rb", **options):
        if "w" in mode:
            written.append(now[0])
            now[0] += 0.5
        return real(self, path, mode, **options)

    monkeypatch.setattr(MemoryBucket, "_open", slow)
    for seconds in (0.5, 1.0, 2.0, 6.0, 6.5, 7.5):
        now[0] = seconds
        lines.append(str(seconds))
    # The first rewrite took half a second until 1.5: the next may come five seconds later.
    assert written == [1.0, 6.5]
    assert (bucket / "a.txt").read_text() == "0.5\n1.0\n2.0\n6.0\n6.5\n"
    lines.flush()
    lines.flush()
    assert written == [1.0, 6.5, 7.5]


def test_an_option_for_local_files_refuses_a_bucket():
    assert files.local_path("a/b") == epath.Path("a/b")
    with pytest.raises(argparse.ArgumentTypeError, match="gs://a/b: expected a path on this mach"):
        files.local_path("gs://a/b")
