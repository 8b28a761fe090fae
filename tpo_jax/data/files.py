"""Files on any path, local or gs://: whole or absent, and files of lines that grow."""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Iterable

from etils import epath

from tpo_jax.errors import MissingFile

SECONDS_BETWEEN_REWRITES = 1.0  # what a bucket takes for one object


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket."""
    return "://" in os.fspath(path)


def local_path(text: str) -> pathlib.Path:
    """An option that names something on this machine; for argparse, refuses a bucket."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(
            f"{text}: expected a path on this machine; copy it here, or mount the bucket"
        )
    return pathlib.Path(text)


def read_text(path: epath.PathLike, what: str) -> str:
    """The text of the file that a flag or an option, `what`, names. Raises MissingFile."""
    path = epath.Path(path)
    if not path.exists():
        raise MissingFile(f"{what}: {path} does not exist; correct the path")
    return path.read_text("utf-8")


def write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it; makes its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


class Lines:
    """A file of lines that grows.

    A local one has a line whole once `append` returns, whatever then happens to the process. A
    bucket cannot append: there the whole file is written again, at most once a second, less often
    where that takes long, and with every `flush`. A process that is killed loses the lines since.

    Args:
      path: the file.
      kept: lines, without their ends, that it begins with; others that are there are dropped.
    """

    def __init__(self, path: epath.PathLike, kept: Iterable[str] = ()):
        self.path = epath.Path(path)
        text = "".join(line + "\n" for line in kept).encode()
        if not self.path.exists() or self.path.read_bytes() != text:
            write(self.path, text)
        self._file: int | None = None
        if is_remote(self.path):
            self._text, self._written = bytearray(text), len(text)
            self._at, self._took = time.monotonic(), 0.0  # of the last rewrite
        else:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, line: str) -> None:
        data = line.encode() + b"\n"
        if self._file is None:
            self._text += data
            pause = SECONDS_BETWEEN_REWRITES * max(1.0, 10 * self._took)
            if time.monotonic() - self._at >= pause:
                self.flush()
            return
        while data:  # a full disk or a signal may cut a write short
            data = data[os.write(self._file, data) :]

    def flush(self) -> None:
        """What was appended is in the bucket when this returns; a local file has it before."""
        if self._file is None and self._written < len(self._text):
            begin = time.monotonic()
            self.path.write_bytes(bytes(self._text))
            self._written, self._at = len(self._text), time.monotonic()
            self._took = self._at - begin

    def sync(self) -> None:
        """Flushes; a local file is on the disk itself when this returns."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            os.close(self._file)
