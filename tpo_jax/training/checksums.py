"""Checksums of the files of a checkpoint, by which damage is found before anything is used.

The files hold compressed arrays without checksums of their own: one flipped bit gives other
weights and no error. So when a save is complete, every process reads back the files that it wrote
and leaves <step>/checksums_<i>.json; a checkpoint counts as complete once those of all
processes are there.
"""

import json
import re
import zlib
from collections.abc import Iterator

from etils import epath

_PREFIX = "checksums_"
_BLOCK = 2**24


def write(step_path: epath.Path, process: int, count: int) -> None:
    """Writes the checksums of the files that `process` (of `count`) wrote; the last act of a save.

    Orbax names what a process writes alone process_<i>; all else is written by process 0.
    """
    sums = {name: _checksum(step_path / name) for name in files(step_path)
            if _owner(name) == process}  # fmt: skip
    temporary = step_path / f"{_PREFIX}{process}.tmp"
    temporary.write_text(json.dumps({"processes": count, "files": sums}))
    temporary.replace(step_path / f"{_PREFIX}{process}.json")


def is_complete(step_path: epath.Path) -> bool:
    """Whether every process has left its checksums; False of what is removed meanwhile."""
    done = list(step_path.glob(f"{_PREFIX}*.json"))
    try:
        return bool(done) and len(done) >= _read(done[0])["processes"]
    except FileNotFoundError:  # process 0 removes what the policy drops while others look
        return False
    except (ValueError, KeyError, TypeError):
        return True  # all there, but damaged


def damaged(step_path: epath.Path, process: int = 0, count: int = 1) -> list[str]:
    """Files that are not as they were written: "<file>: <what>".

    With several processes each looks at every `count`-th file.
    """
    expected: dict[str, list[int]] = {}
    for path in step_path.glob(f"{_PREFIX}*.json"):
        try:
            expected |= _read(path)["files"]
        except (ValueError, KeyError, TypeError) as error:
            return [f"{path.name}: cannot be read ({error})"]
    there = set(files(step_path))
    problems = []
    for name in sorted(expected)[process::count]:
        if name not in there:
            problems.append(f"{name}: missing")
        elif (found := _checksum(step_path / name)) != expected[name]:
            what = "size" if found[0] != expected[name][0] else "checksum"
            problems.append(f"{name}: another {what}")
    return problems


def files(step_path: epath.Path) -> Iterator[str]:
    """Names of all files below, relative, checksums left out."""
    for path in sorted(step_path.iterdir()):
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in files(path))
        elif not path.name.startswith(_PREFIX):
            yield path.name


def _owner(name: str) -> int:
    match = re.search(r"process_(\d+)", name)
    return int(match[1]) if match else 0


def _checksum(path: epath.Path) -> list[int]:
    """[size, CRC-32]."""
    size = value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, value = size + len(block), zlib.crc32(block, value)
    return [size, value]


def _read(path: epath.Path) -> dict:
    return json.loads(path.read_text())
