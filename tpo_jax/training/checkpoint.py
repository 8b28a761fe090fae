"""Checkpoints of a run: Orbax (v1) directories, one per step, written in the background.

A checkpoint is one unit: (train state, iterator state, progress, ledger, config, identity).
Leaving one of them out is how a resumed run sees a batch twice or forgets its best model.

Layout: <directory>/<step>/state/ holds the arrays, <step>/run/data.json all else,
<step>/checksums_*.json what is in the files. Orbax writes into <step>.orbax-checkpoint-tmp and
renames when every process is done; then the checksums follow. A process killed at any moment leaves
complete checkpoints and remains, which are removed at the next start. A checkpoint whose files have
changed since it was written is refused by name.

The state is stored as a flat dict {"params/vision/...": array}: the files depend on path names,
not on the classes that held the leaves, and a wrong structure is reported by name.

`LocalCheckpoints`, a second and faster tier on the hosts, may stand beside the directory: a run
then goes on from the newest step that is complete in either of them.

This module calls Orbax's free functions rather than its `Checkpointer`: that class asks JAX's
preemption service about *its* step numbers, from a background thread as well, which would
disturb the sequence that training.preemption counts (a service expects one increasing sequence).
"""

import concurrent.futures
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tpo_jax.errors import UserError
from tpo_jax.parallel.paths import first_match, flatten
from tpo_jax.training import checksums
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.save_policy import Save, SavePolicy

FORMAT_VERSION = 2
_STATE, _RUN, _SAVE = "state", "run", "save"
_RUN_PARTS = ("data", "progress", "ledger", "config", "identity")


class CheckpointError(UserError):
    """A checkpoint that cannot be used as it is; the message names file, leaf and fix."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not as they were written."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one training step needs to go on as if nothing had happened.

    Attributes:
      state: pytree of global jax.Array (training.state.TrainState); None where only the rest was
        read.
      data: iterator state: next step, and which source has given how much.
      progress: what the loop remembers beside the state (last evaluation, best result), JSON.
      ledger: training.ledger.Ledger.state(), JSON.
      config: the run's config as plain dict, JSON. Its seed, with the step, is every random key.
      identity: training.agreement.identity(): code, mesh, data and random settings of the writer,
        JSON.
    """

    state: Any
    data: dict[str, Any]
    progress: dict[str, Any]
    ledger: dict[str, Any]
    config: dict[str, Any]
    identity: dict[str, Any]


class Checkpoints:
    """The checkpoints under one directory. Every process makes the same calls in the same order.

    At most one save is under way in each tier; the next `save` and `close` wait for it and raise
    its error.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        policy: SavePolicy | None,
        local: LocalCheckpoints | None = None,
    ) -> None:
        """Opens `directory`, which the first save makes where it is not there.

        Args:
          policy: decides which checkpoints stay. None: to look only, nothing is changed.
          local: takes the saves of kind "local"; None: there are none.
        """
        self.directory = epath.Path(directory)
        if not self.directory.is_absolute():
            self.directory = self.directory.resolve()  # Orbax refuses relative paths
        self._policy = policy
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._intact: set[int] = set()  # steps whose files were looked at
        self._local = local
        self._local_step: int | None = None  # which `latest` has found there
        self._saves: dict[int, Save] = {}  # what is known of the steps that are there
        if policy is not None and jax.process_index() == 0 and self.directory.exists():
            for leftover in self._leftovers():
                leftover.rmtree()

    def _leftovers(self) -> list[epath.Path]:
        """Directories of saves and removals that were cut off.

        Raises:
          CheckpointError: a checkpoint of another format, which is no leftover.
        """
        found = []
        for path in self.directory.iterdir():
            if re.search(r"\.(orbax-checkpoint-tmp.*|removed)$", path.name):
                found.append(path)
            elif re.fullmatch(r"\d+", path.name) and not checksums.is_complete(path):
                self._check_version(path)
                found.append(path)
        return found

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.directory.exists():
            return []
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if re.fullmatch(r"\d+", path.name) and checksums.is_complete(path)
        )

    def latest(self) -> int | None:
        """Newest complete step of both tiers, the same on every process, or None.

        Process 0 decides what is in the directory; from there on `read`, `check` and `restore` of
        a step that the hosts have themselves take it from them.
        """
        steps = self.steps()
        newest = steps[-1] if steps else -1
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(newest))
        if self._local is not None:
            self._local_step = self._local.latest(newest, FORMAT_VERSION)
            newest = newest if self._local_step is None else self._local_step
        return None if newest < 0 else newest

    def save(self, step: int, checkpoint: Checkpoint, save: Save) -> None:
        """Starts a save. The state may be donated once `wait_for_copy` has returned, not before.

        A step that is saved already is left alone: (seed, step) determines its content.
        """
        run = {part: getattr(checkpoint, part) for part in _RUN_PARTS}
        run |= {"format_version": FORMAT_VERSION, _SAVE: save.to_json()}
        json.dumps(run)  # raises here, on this thread, if a part is not JSON
        if "local" in save.kinds:
            self._wait_local()
            self._local.save(step, checkpoint.state, run)
        if save.kinds == ("local",):
            return  # beside one of the directory that may be under way
        self._wait_directory()
        path = self.directory / str(step)
        if checksums.is_complete(path):
            return
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        with _orbax_context():
            written = ocp.save_checkpointables_async(
                path, {_STATE: flatten(checkpoint.state), _RUN: run}
            )
        self._pending = self._writer.submit(self._finish, written, path)

    @property
    def is_copying(self) -> bool:
        """Whether `wait_for_copy` would wait; `save` itself waits for the copy of the directory."""
        return self._local is not None and self._local.is_copying

    def wait_for_copy(self) -> None:
        """Blocks until the state of the last save is copied to the host."""
        if self._local is not None:
            self._local.wait_for_copy()

    def _finish(self, written: ocp.AsyncResponse[None], path: epath.Path) -> None:
        written.result()
        checksums.write(path, jax.process_index(), jax.process_count())

    def wait(self) -> None:
        """Blocks until the saves under way are complete, then removes what the policy drops.

        Raises:
          CheckpointError: a save failed.
        """
        self._wait_local()
        self._wait_directory()

    def close(self) -> None:
        """`wait`, of all processes for all: what process 0 counts as complete is what there is."""
        self.wait()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.directory}: closed")
        self._remove_dropped()

    def _wait_directory(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise self._failed(self.directory, error) from error
        self._remove_dropped()

    def _remove_dropped(self) -> None:
        """Removes what the policy drops; what another process still writes counts next time."""
        if jax.process_index() or self._policy is None:
            return
        there = self.steps()
        self._saves = {step: self._saves.get(step) or self._read_save(step) for step in there}
        for step in sorted(set(there) - self._policy.retained(self._saves)):
            self._remove(step)

    def _wait_local(self) -> None:
        if self._local is None:
            return
        try:
            self._local.wait()
        except Exception as error:
            raise self._failed(self._local.directory, error) from error

    def _failed(self, where: epath.Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{where}: a save failed: {error}\nComplete are the steps {self.steps()}; "
            "see to the storage (full, or not writable?), then start the same command again"
        )

    def forget_local(self) -> None:
        """Removes what the hosts have: the run is over."""
        if self._local is not None:
            self._local.remove_after(-1)

    def _read_save(self, step: int) -> Save:
        try:
            run = json.loads(self._run_file(self.directory / str(step)).read_text())
            return Save.from_json(run[_SAVE])
        except (OSError, ValueError, KeyError, TypeError):
            return Save(("permanent",))  # what cannot be read is not ours to remove

    def _remove(self, step: int) -> None:
        path = self.directory / str(step)
        if "://" not in str(path):  # on object stores renaming is copying
            removed = path.with_name(f"{step}.removed")
            path.rename(removed)  # half of a checkpoint must not look like one
            path = removed
        path.rmtree()

    def set_aside_after(self, step: int) -> list[int]:
        """Renames newer checkpoints to <step>.set_aside, so that a run goes on from `step`.

        Local ones are removed.
        """
        newer = [other for other in self.steps() if other > step]
        if self._local is not None:
            self._local.remove_after(step)
            self._local_step = None
        if jax.process_index() == 0:
            for other in newer:
                aside = self.directory / f"{other}.set_aside"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(other)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set_aside_after:{step}")
        return newer

    def read(self, step: int) -> Checkpoint:
        """All but the state of the checkpoint of `step`, after its files have been checked.

        Raises:
          DamagedCheckpoint: names every file that is not as it was written.
          CheckpointError: the format version differs.
        """
        if step == self._local_step:
            run = self._local.read(step)
        else:
            path = self.directory / str(step)
            if step not in self._intact:
                self._check_files(path)
                self._intact.add(step)
            self._check_version(path)
            run = json.loads(self._run_file(path).read_text())
        return Checkpoint(state=None, **{part: run[part] for part in _RUN_PARTS})

    def _check_files(self, path: epath.Path) -> None:
        wrong = checksums.damaged(path, jax.process_index(), jax.process_count())
        anywhere = bool(wrong)
        if jax.process_count() > 1:  # or one would leave and the others wait for it
            anywhere = bool(np.any(multihost_utils.process_allgather(np.array(anywhere))))
        if anywhere:
            listed = "\n".join(f"  {line}" for line in wrong or ["(files that others looked at)"])
            raise DamagedCheckpoint(f"{path}: damaged since it was written:\n{listed}")

    def restore(
        self,
        step: int,
        abstract_state: Any,
        *,
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        cast: bool = False,
    ) -> Checkpoint:
        """Reads the checkpoint of `step` into the shapes, dtypes and shardings asked for.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct *with* shardings; the mesh may differ
            from the one that saved.
          missing: regexes of leaves that the checkpoint may lack; they come back as they were
            given, for the caller to fill.
          extra: regexes of leaves of the checkpoint that are left out.
          cast: whether a leaf of another dtype is converted.

        Raises:
          CheckpointError: damaged, another format version, or another structure than is asked for
            and allowed; names every leaf.
        """
        checkpoint = self.read(step)
        if step == self._local_step and self._local.fits(abstract_state):
            return dataclasses.replace(checkpoint, state=self._local.restore(step, abstract_state))
        saved = self.check(step, abstract_state, missing=missing, extra=extra, cast=cast)
        asked = flatten(abstract_state)
        wanted = {name: leaf for name, leaf in asked.items() if name in saved}
        with _orbax_context(partial=bool(extra)):
            loaded = ocp.load_checkpointables(self.directory / str(step), {_STATE: wanted})[_STATE]
        state = jax.tree.unflatten(
            jax.tree.structure(abstract_state), [loaded.get(name, asked[name]) for name in asked]
        )
        return dataclasses.replace(checkpoint, state=state)

    def check(
        self,
        step: int,
        abstract_state: Any,
        *,
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        cast: bool = False,
    ) -> dict[str, Any]:
        """Shapes and dtypes that are saved, by path; raises as `restore` but reads no array."""
        if step == self._local_step and self._local.fits(abstract_state):
            return flatten(abstract_state)
        path = self.directory / str(step)
        with _orbax_context():
            saved = ocp.checkpointables_metadata(path).metadata[_STATE]
        _check_structure(path, flatten(abstract_state), saved, missing, extra, cast)
        return saved

    def newest_good(self, before: int) -> int | None:
        """The newest step below `before` whose files are as they were written (one process)."""
        older = (step for step in reversed(self.steps()) if step < before)
        return next((s for s in older if not checksums.damaged(self.directory / str(s))), None)

    def _run_file(self, path: epath.Path) -> epath.Path:
        return path / _RUN / "data.json"

    def _check_version(self, path: epath.Path) -> None:
        try:
            version = json.loads(self._run_file(path).read_text())["format_version"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # cut off or damaged, which others report
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, this program reads {FORMAT_VERSION}; start "
                "from the run's model folder (init_from) in a new workdir"
            )


def _orbax_context(partial: bool = False) -> ocp.Context:
    """Says which handler writes which part; Orbax alone would store small dicts as arrays.

    `partial` allows to read some leaves and leave the rest.
    """
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_RUN)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    return context


def _check_structure(
    path: epath.Path,
    asked: dict[str, Any],
    saved: dict[str, Any],
    missing: Sequence[str],
    extra: Sequence[str],
    cast: bool,
) -> None:
    """Raises with every leaf that is missing, extra, or of another shape or dtype."""
    lines = [
        f"  {name}: not in the checkpoint"
        for name in asked
        if name not in saved and first_match(missing, name) is None
    ]
    lines += [
        f"  {name}: in the checkpoint only"
        for name in saved
        if name not in asked and first_match(extra, name) is None
    ]
    for name, leaf in asked.items():
        have = saved.get(name)
        if have is None:
            continue
        same_type = cast or have.dtype == leaf.dtype
        if tuple(have.shape) != tuple(leaf.shape) or not same_type:
            lines.append(
                f"  {name}: checkpoint has {have.dtype}{list(have.shape)}, "
                f"the config asks for {leaf.dtype}{list(leaf.shape)}"
            )
    if lines:
        raise CheckpointError(
            f"{path}: the saved state is not the one this config describes "
            f"({len(lines)} of {len(asked)} leaves):\n" + "\n".join(lines) + "\n"
            "Resume with the config of the run (workdir/config.json), or use a new workdir; "
            "to take weights only, set init_from to a model folder."
        )


def check(directory: epath.PathLike, abstract_state: Any) -> tuple[int, dict[str, Any]] | None:
    """Raises if `Checkpoints.restore` would find another structure in the newest checkpoint.

    Reads no array, and changes nothing in the directory: a run may be writing there.

    Returns:
      (step, config of the run), or None where there is no checkpoint.
    """
    checkpoints = Checkpoints(directory, None)
    step = checkpoints.latest()
    if step is None:
        return None
    checkpoints.check(step, abstract_state)
    run = json.loads(checkpoints._run_file(checkpoints.directory / str(step)).read_text())
    return step, run["config"]
