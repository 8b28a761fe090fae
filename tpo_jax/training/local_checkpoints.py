"""Checkpoints on the hosts themselves: a folder of each, on its disk or in its memory.

Every process writes what its own devices hold, without a word to the others:
<local_dir>/<run>/process_<i>/<step>/state.safetensors has each part of a leaf once, named
"params/vision/kernel@0:64,0:128"; run.json has all else (iterator, progress, ledger, config,
identity); checksums_0.json what is in the two. A step counts when every process has its part. One
whose folder is lost or damaged gets it from a process that holds the same parts of the model, which
the other slices (copies along mesh.data) do; where nobody does, the step is not used.

The parts are those of one mesh and number of processes: the directory of `Checkpoints` serves all
others. Files on a host belong to one run: <run> is drawn when the workdir is first used.
"""

import concurrent.futures
import functools
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tpo_jax.data import files
from tpo_jax.interop.tensors import BLOCK_BYTES, lazy, read_file, write_file
from tpo_jax.parallel.paths import flatten, map_with_path
from tpo_jax.training import checksums

_STATE, _RUN = "state.safetensors", "run.json"
_FILES = (_STATE, _RUN, "checksums_0.json")
_LAYOUT = "layout"


class LocalCheckpoints:
    """What this process keeps of a run. Every process makes the same calls in the same order."""

    def __init__(
        self,
        local_dir: epath.PathLike,
        workdir: epath.Path,
        abstract_state: Any,
        say: Callable[[str], None],
    ) -> None:
        """Changes nothing on the host yet.

        Args:
          local_dir: config.checkpoint.local_dir.
          workdir: of the run; run_id is written there.
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings, to restore into.
          say: told why a step is not used, or from whom it was taken.
        """
        run = _gather(_run_name(workdir) if jax.process_index() == 0 else "")[0]
        self.directory = epath.Path(local_dir) / run / f"process_{jax.process_index()}"
        self._layout, self._say = layout(abstract_state), say
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "local_checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._copied = threading.Event()  # the state of the last save
        self._copied.set()
        self._valid: list[int] = []  # steps of this start, complete or being written

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
        """Starts a save. `state` may be donated once `wait_for_copy` has returned, not before.

        Of the steps before, two stay. That the last one is here does not say that it is complete
        elsewhere, but the one before it is: its writers have waited for it before they began
        the last one, and without that they could not have taken part in the steps up to this state.
        """
        self.wait()
        text = json.dumps(dict(run) | {_LAYOUT: layout(state)})
        parts: dict[str, jax.Array] = {}
        for path, leaf in flatten(state).items():
            for shard in leaf.addressable_shards:
                parts.setdefault(_name(path, shard.index, leaf.shape), shard.data)
        for part in parts.values():
            part.copy_to_host_async()
        self._valid = [*[other for other in self._valid if other < step][-2:], step]
        self._copied.clear()
        self._pending = self._writer.submit(self._write, step, parts, text, self._valid[:-1])

    def _write(
        self, step: int, parts: Mapping[str, jax.Array], run: str, stay: list[int]
    ) -> None:
        try:
            copies = {name: lazy(_to_host(part)) for name, part in parts.items()}
        finally:
            self._copied.set()
        self._remove(lambda other: other not in stay)
        with _Whole(self.directory / str(step)) as folder:
            write_file(folder / _STATE, copies, {})
            (folder / _RUN).write_text(run)
            checksums.write(folder, 0, 1)

    @property
    def is_copying(self) -> bool:
        """Whether the state of the last save is not yet copied."""
        return not self._copied.is_set()

    def wait_for_copy(self) -> None:
        """Blocks until the state of the last save is copied. Raises nothing: `wait` does."""
        self._copied.wait()

    def wait(self) -> None:
        """Blocks until the save under way is written; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove_after(self, step: int) -> None:
        self._valid = [other for other in self._valid if other <= step]
        self._remove(lambda other: other > step)

    def _remove(self, which: Callable[[int], bool]) -> None:
        """Removes steps, and what was cut off while it was written."""
        if not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if not re.fullmatch(r"\d+", path.name) or which(int(path.name)):
                path.rmtree()

    def latest(self, oldest: int, format_version: int) -> int | None:
        """The newest step, not below `oldest`, that is whole on every process; None without one.

        A process that lacks its part of it has it afterwards. One of another format version is
        not used.
        """
        self.wait()
        wanted = _gather(self._layout)
        steps = {step for held in _gather(self._held()) for step in held if step >= oldest}
        for step in sorted(steps, reverse=True):
            if self._complete(step, wanted, format_version):
                self._valid = [step]
                self._say(f"going on from the local checkpoint of step {step}")
                return step
        self._valid = []
        if oldest >= 0:
            self._say("no local checkpoint can be used that is as new as the workdir's")
        return None

    def _held(self) -> list[int]:
        """Steps that are here."""
        if not self.directory.exists():
            return []
        names = (path.name for path in self.directory.iterdir())
        return [int(name) for name in names if re.fullmatch(r"\d+", name)]

    def _complete(self, step: int, wanted: list[str], version: int) -> bool:
        """Whether every process has its part of `step`, after it was sent to those without.

        Args:
          wanted: layouts of the processes.
        """
        problems = _gather(self._problem(step, version))
        lacking = [i for i, problem in enumerate(problems) if problem]
        if not lacking:
            return True
        givers = {wanted[i]: i for i in reversed(range(len(wanted))) if not problems[i]}
        told = [f"local checkpoint of step {step}:"]
        for i in lacking:
            giver = givers.get(wanted[i])
            fix = "no other process has it" if giver is None else f"taken from process {giver}"
            told.append(f"  process {i}: {problems[i]}; {fix}")
        if all(wanted[i] in givers for i in lacking):
            for part in sorted({wanted[i] for i in lacking}):
                self._send(step, givers[part], [i for i in lacking if wanted[i] == part])
            problems = _gather(self._problem(step, version))
            told += [f"  process {i}: {problem}" for i, problem in enumerate(problems) if problem]
        self._say("\n".join(told))
        return not any(problems)

    def _problem(self, step: int, version: int) -> str:
        """Why the part of this process cannot be used; "" if it can."""
        path = self.directory / str(step)
        if not path.exists():
            return "has no files"
        try:
            run = self.read(step)
            if run["format_version"] != version:
                return f"has format version {run['format_version']}, this program reads {version}"
            if run[_LAYOUT] != self._layout:
                return "was written for another mesh, number of processes or program"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the checksums tell
        if not checksums.is_complete(path):
            return "damaged since it was written: no checksums"
        if wrong := checksums.damaged(path):
            return f"damaged since it was written: {', '.join(wrong)}"
        return ""

    def _send(self, step: int, source: int, receivers: list[int]) -> None:
        """Copies the folder of process `source` to others; all processes take part."""
        mine, path = jax.process_index(), self.directory / str(step)
        there = mine == source
        sizes = _gather([(path / name).stat().length for name in _FILES] if there else [])[source]
        blocks = (
            (name, multihost_utils.broadcast_one_to_all(block, is_source=there)[:length])
            for name, block, length in _blocks(path, sizes, there)
        )
        if mine not in receivers:
            for _ in blocks:
                pass
            return
        with _Whole(path) as folder:
            for name in _FILES:
                (folder / name).touch()
            for name, block in blocks:
                with (folder / name).open("ab") as stream:
                    stream.write(block.tobytes())

    def read(self, step: int) -> dict[str, Any]:
        """All but the state of a step that `latest` gave."""
        return json.loads((self.directory / str(step) / _RUN).read_text())

    def fits(self, abstract_state: Any) -> bool:
        """Whether `abstract_state` has the leaves, dtypes, shapes and shardings kept here."""
        return layout(abstract_state) == self._layout

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step that `latest` gave; `abstract_state` has to fit."""
        arrays = read_file(self.directory / str(step) / _STATE)

        def leaf(path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
            @functools.cache  # devices that hold the same part
            def part(name: str) -> np.ndarray:
                return np.asarray(arrays[name])

            return jax.make_array_from_callback(
                want.shape, want.sharding, lambda index: part(_name(path, index, want.shape))
            )

        return map_with_path(leaf, abstract_state)


class _Whole:
    """A folder that appears under its name when it is written, in the place of an older one."""

    def __init__(self, path: epath.Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.tmp")

    def __enter__(self) -> epath.Path:
        if self._temporary.exists():
            self._temporary.rmtree()
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            if self._path.exists():
                self._path.rmtree()
            self._temporary.rename(self._path)


def layout(state: Any) -> str:
    """Digest of what this process holds of a state: paths, dtypes, shapes and parts of its leaves.

    Args:
      state: pytree of jax.Array or jax.ShapeDtypeStruct, with shardings.
    """
    digest = hashlib.sha256()
    for path, leaf in flatten(state).items():
        indices = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
        names = sorted({_name(path, index, leaf.shape) for index in indices})
        digest.update(f"{names} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
    return digest.hexdigest()[:16]


def _to_host(part: jax.Array) -> np.ndarray:
    """A copy that does not change when `part` is donated.

    Of an array on a CPU, NumPy sees the very memory; of any other it has a copy of its own.
    """
    host = np.asarray(part)
    (device,) = part.devices()
    return host.copy() if device.platform == "cpu" else host


def _name(path: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Of a part of a leaf: "params/vision/kernel@0:64,0:128"."""
    bounds = (each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
    return f"{path}@{','.join(f'{start}:{stop}' for start, stop in bounds)}"


def _blocks(
    path: epath.Path, sizes: list[int], there: bool
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(file, uint8[block], bytes of the file in it): the files of a step in pieces of one size.

    Where the files are not `there` the pieces are empty. One size, so that one program sends them.
    """
    block = min(BLOCK_BYTES, max(sizes))
    for name, size in zip(_FILES, sizes, strict=True):
        for start in range(0, size, block):
            piece, length = np.zeros(block, np.uint8), min(block, size - start)
            if there:
                with (path / name).open("rb") as stream:
                    stream.seek(start)
                    piece[:length] = np.frombuffer(stream.read(length), np.uint8)
            yield name, piece, length


def _run_name(workdir: epath.Path) -> str:
    """Name of the run in `workdir`: another one if that was copied, or emptied and used anew."""
    file = workdir / "run_id"
    if not file.exists():
        files.write(file, secrets.token_hex(8))
    where = workdir if "://" in str(workdir) else workdir.resolve()
    digest = hashlib.sha256(f"{where} {file.read_text()}".encode())
    return f"{workdir.name}-{digest.hexdigest()[:12]}"


def _gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    longest = int(np.max(multihost_utils.process_allgather(np.array(len(text)))))
    padded = np.frombuffer(text.ljust(longest, b" "), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
