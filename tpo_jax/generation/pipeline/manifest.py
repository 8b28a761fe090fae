"""What a stage has done, on disk: one JSON object a line, and the options that it was done with.

A record counts once its newline is written, so that a command that was killed at any byte leaves
whole records and at most one cut line, which the next start removes. A bucket has the records of a
second or so ago, and all of a stage that is done or of a command that was told to stop
(`data.files.Lines`). Every record carries a digest
of what it was made from: work that no longer fits its input is refused, not mixed in.

Of several processes the first one reads and writes; the others hold the same records.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from tpo_jax.data import files
from tpo_jax.errors import UserError
from tpo_jax.parallel.distributed import of_process_0

FORMAT_VERSION = 2
SETTINGS = "settings.json"

Record = dict[str, Any]


class ManifestError(UserError):
    """A folder whose records cannot be gone on with; the message names file, option and fix."""


class FolderBusy(ManifestError):
    """Another command holds the folder."""


def read_file(path: epath.Path) -> bytes:
    """A file as process 0 sees it, b"" where there is none: to another it may show up later."""
    is_there = jax.process_index() == 0 and path.exists()
    return of_process_0(path.read_bytes() if is_there else b"")


def whole_lines(path: epath.Path) -> list[bytes]:
    return read_file(path).split(b"\n")[:-1]


def read_records(path: epath.Path, lines: Sequence[bytes], key: str = "id") -> dict[str, Record]:
    """The records of a manifest's lines by their key, in their order."""
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            name = record[key]
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{where}: not a record with {key!r} ({error}): {line[:80]!r}. Remove the "
                "line and the manifests of later stages, or give another --out.") from error
        if name in records:
            raise ManifestError(f"{where}: {key} {name!r} occurs twice. Remove the "
                                "second line and the manifests of later stages.")
        records[name] = record
    return records


class Manifest:
    """The records of one stage by id, in the order in which they were written.

    Args:
      path: a file, which need not exist.
      key: field that names a record.
    """

    def __init__(self, path: epath.PathLike, key: str = "id"):
        self.path, self.key = epath.Path(path), key
        lines = whole_lines(self.path)
        self.records = read_records(self.path, lines, key)
        self._lines = None
        if jax.process_index() == 0:
            self._lines = files.Lines(self.path, [line.decode() for line in lines])

    def append(self, record: Record) -> None:
        """Writes one record; it is there whole or not at all for whoever reads next."""
        name = record[self.key]
        if name in self.records:
            raise ValueError(f"{self.path}: {self.key} {name!r} is there already")
        if self._lines:
            self._lines.append(json.dumps(record))
        self.records[name] = record

    def sync(self) -> None:
        """Records outlive the machine when this returns: later stages may build on them."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        if self._lines:
            self._lines.close()


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Folder:
    """The manifests of all stages and their options (a context manager that one command holds).

    A second command into a local folder is refused; a bucket has no locks.

    Args:
      path: the folder.
      names: {stage: file name}, in the order of the stages.
      options: {stage: {option: JSON value}} of this command.
      keys: {stage: field that names its records} where that is not "id".
    """

    def __init__(self, path: epath.PathLike, names: Mapping[str, str],
                 options: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]):
        self.path = epath.Path(path)
        self._names, self._keys = names, keys
        self._options = json.loads(json.dumps(options))
        self._manifests: dict[str, Manifest] = {}

    def __enter__(self) -> Folder:
        self._lock = None
        is_first = jax.process_index() == 0
        if is_first and not files.is_remote(self.path):
            self._lock = self._locked()
        is_held = is_first and self._lock is None and not files.is_remote(self.path)
        if of_process_0(b"held" if is_held else b""):
            raise FolderBusy(f"{self.path}: another command is writing here. Wait for it, or "
                             "give another --out.")
        try:
            check_options(self.path, self._names, self._options)
            if is_first:
                text = json.dumps({"format_version": FORMAT_VERSION, "stages": self._options},
                                  indent=2)
                files.write(self.path / SETTINGS, text + "\n")
            for stage, name in self._names.items():
                self._manifests[stage] = Manifest(self.path / name, self._keys.get(stage, "id"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for manifest in self._manifests.values():
            manifest.close()
        if self._lock is not None:
            os.close(self._lock)  # which unlocks

    def _locked(self) -> int | None:
        """The descriptor that holds the lock, None while another command holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return lock

    def __getitem__(self, stage: str) -> Manifest:
        return self._manifests[stage]

    def records(self) -> Iterator[Record]:
        for manifest in self._manifests.values():
            yield from manifest.records.values()


def check_options(folder: epath.Path, names: Mapping[str, str],
                  options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses options that differ from those that records of this stage or a later one had.

    Args:
      names, options: as of `Folder`, of this command.
    """
    stored = _stored(folder / SETTINGS)
    lines, first = [], None
    for stage in _until_last(names, folder):
        there, now = stored.get(stage, {}), options[stage]
        for name in sorted(there.keys() | now.keys()):
            if there.get(name) != now.get(name):
                first = first or stage
                lines.append(f"  {stage}: {name}: there {there.get(name)!r}, now "
                             f"{now.get(name)!r}")
    if lines:
        stages = list(names)
        later = ", ".join(names[stage] for stage in stages[stages.index(first):])
        raise ManifestError(
            f"{folder}: holds records that were made otherwise:\n" + "\n".join(lines)
            + f"\nGive another --out, or remove {later} there to do these stages again.")


def _stored(file: epath.Path) -> dict[str, Any]:
    data = read_file(file)
    if not data:
        return {}
    settings = json.loads(data)
    version = settings.get("format_version")
    if version != FORMAT_VERSION or "stages" not in settings:
        raise ManifestError(
            f"{file}: format_version is {version!r}, expected {FORMAT_VERSION} with 'stages': "
            "the folder is of another version of `generate`. Give another --out.")
    return settings["stages"]


def _until_last(stages: Mapping[str, str], folder: epath.Path) -> Sequence[str]:
    """The stages up to the last one that has records."""
    names = list(stages)
    has = [bool(read_file(folder / file)) for file in stages.values()]
    return names[: max((i + 1 for i, there in enumerate(has) if there), default=0)]
