"""What a stage has done, on disk: one JSON object a line, and the options that it was done with.

A record counts once its newline is written, so that a command that was killed at any byte leaves
whole records and at most one cut line, which the next start removes. A bucket has the records of a
second or so ago, and all of a stage that is done or of a command that was told to stop
(`data.files.Lines`). Every record carries a digest
of what it was made from: work that no longer fits its input is refused, not mixed in.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from tpo_jax.data import files
from tpo_jax.errors import UserError

FORMAT_VERSION = 1
SETTINGS = "settings.json"

Record = dict[str, Any]


class ManifestError(UserError):
    """A folder whose records cannot be gone on with; the message names file, option and fix."""


class Manifest:
    """The records of one stage by id, in the order in which they were written.

    Args:
      path: a file, which need not exist.
      key: field that names a record.
    """

    def __init__(self, path: epath.PathLike, key: str = "id"):
        self.path, self.key = epath.Path(path), key
        self.records: dict[str, Record] = {}
        self._lines = files.Lines(self.path, self._read())

    def _read(self) -> list[str]:
        """The whole lines, each a record."""
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line)
                name = record[self.key]
            except (ValueError, KeyError, TypeError) as error:
                raise ManifestError(
                    f"{where}: not a record with {self.key!r} ({error}): {line[:80]!r}. Remove the "
                    "line and the manifests of later stages, or give another --out.") from error
            if name in self.records:
                raise ManifestError(f"{where}: {self.key} {name!r} occurs twice. Remove the "
                                    "second line and the manifests of later stages.")
            self.records[name] = record
        return [line.decode() for line in lines]

    def append(self, record: Record) -> None:
        """Writes one record; it is there whole or not at all for whoever reads next."""
        name = record[self.key]
        if name in self.records:
            raise ValueError(f"{self.path}: {self.key} {name!r} is there already")
        self._lines.append(json.dumps(record))
        self.records[name] = record

    def sync(self) -> None:
        """Records outlive the machine when this returns: later stages may build on them."""
        self._lines.sync()

    def close(self) -> None:
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
        self._lock = None if files.is_remote(self.path) else self._locked()
        try:
            self._check_options()
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

    def _locked(self) -> int:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise ManifestError(f"{self.path}: another command is writing here. Wait for it, or "
                                "give another --out.") from error
        return lock

    def __getitem__(self, stage: str) -> Manifest:
        return self._manifests[stage]

    def records(self) -> Iterator[Record]:
        for manifest in self._manifests.values():
            yield from manifest.records.values()

    def _check_options(self) -> None:
        """Refuses options that differ from those that records of this stage or a later one had."""
        file = self.path / SETTINGS
        stored = self._stored(file)
        begun = _until_last(self._names, self.path)
        lines, first = [], None
        for stage in begun:
            there, now = stored.get(stage, {}), self._options[stage]
            for name in sorted(there.keys() | now.keys()):
                if there.get(name) != now.get(name):
                    first = first or stage
                    lines.append(f"  {stage}: {name}: there {there.get(name)!r}, now "
                                 f"{now.get(name)!r}")
        if lines:
            names = list(self._names)
            later = ", ".join(self._names[stage] for stage in names[names.index(first):])
            raise ManifestError(
                f"{self.path}: holds records that were made otherwise:\n" + "\n".join(lines)
                + f"\nGive another --out, or remove {later} there to do these stages again.")
        text = json.dumps({"format_version": FORMAT_VERSION, "stages": self._options}, indent=2)
        files.write(file, text + "\n")

    def _stored(self, file: epath.Path) -> dict[str, Any]:
        if not file.exists():
            return {}
        settings = json.loads(file.read_text())
        version = settings.get("format_version")
        if version != FORMAT_VERSION or "stages" not in settings:
            raise ManifestError(
                f"{file}: format_version is {version!r}, expected {FORMAT_VERSION} with 'stages': "
                "the folder is of another version, or of `generate` without --writer. Give "
                "another --out.")
        return settings["stages"]


def _until_last(stages: Mapping[str, str], folder: epath.Path) -> Sequence[str]:
    """The stages up to the last one that has records."""
    names = list(stages)
    has = [_has_bytes(folder / file) for file in stages.values()]
    return names[: max((i + 1 for i, there in enumerate(has) if there), default=0)]


def _has_bytes(file: epath.Path) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as opened:
        return bool(opened.read(1))
