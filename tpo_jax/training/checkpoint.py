"""Checkpoints of a run: Orbax (v1) directories, one per step, written in the background.

A checkpoint is one unit: (train state, iterator state, progress, ledger, config, format version).
Leaving one of them out is how a resumed run sees a batch twice or forgets its best model.

Layout: <directory>/<step>/state/ holds the arrays, <step>/run/data.json all else. Orbax writes into
<step>.orbax-checkpoint-tmp and renames when every process is done, so a process killed at any
moment leaves complete checkpoints only; what it left half-written is removed at the next start.

The state is stored as a flat dict {"params/vision/...": array}: the files depend on path names,
not on the classes that held the leaves, and a wrong structure is reported by name.

This module calls Orbax's free functions rather than its `Checkpointer`: that class asks JAX's
preemption service about *its* step numbers, from a background thread as well, which would
disturb the sequence that training.preemption counts (a service expects one increasing sequence).
"""

import dataclasses
import json
import re
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tpo_jax.parallel.paths import flatten

FORMAT_VERSION = 1
_STATE, _RUN = "state", "run"
_RUN_PARTS = ("data", "progress", "ledger", "config")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names file, leaf and fix."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one training step needs to go on as if nothing had happened.

    Attributes:
      state: pytree of global jax.Array (training.state.TrainState).
      data: iterator state, {"next_step": int}.
      progress: what the loop remembers beside the state (last evaluation, best result), JSON.
      ledger: training.ledger.Ledger.state(), JSON.
      config: the run's config as plain dict, JSON.
    """

    state: Any
    data: dict[str, Any]
    progress: dict[str, Any]
    ledger: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints under one directory. Every process makes the same calls in the same order.

    At most one save is under way; the next `save` and `close` wait for it and raise its error.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int) -> None:
        """Opens (or creates) `directory`; keeps the newest `keep` checkpoints."""
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep}: at least one checkpoint must be kept")
        self.directory = epath.Path(directory)
        if not self.directory.is_absolute():
            self.directory = self.directory.resolve()  # Orbax refuses relative paths
        self._keep = keep
        self._pending: ocp.AsyncResponse[None] | None = None
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                leftover.rmtree()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.directory.exists():
            return []
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    def latest(self) -> int | None:
        """Newest complete step, the same on every process (process 0 decides), or None."""
        steps = self.steps()
        newest = steps[-1] if steps else -1
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(newest))
        return None if newest < 0 else newest

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Starts a save. Returns when the state is copied to the host, so it may be donated.

        A step that is saved already is left alone: (seed, step) determines its content.
        """
        self.wait()
        if step in self.steps():
            return
        run = {part: getattr(checkpoint, part) for part in _RUN_PARTS}
        run["format_version"] = FORMAT_VERSION
        json.dumps(run)  # raises here, on this thread, if a part is not JSON
        with _orbax_context():
            self._pending = ocp.save_checkpointables_async(
                self.directory / str(step), {_STATE: flatten(checkpoint.state), _RUN: run}
            )

    def wait(self) -> None:
        """Blocks until the save under way is complete, then removes the oldest checkpoints."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.result()
        if jax.process_index() == 0:
            for step in self.steps()[: -self._keep]:
                (self.directory / str(step)).rmtree()

    close = wait

    def restore(self, step: int, abstract_state: Any) -> Checkpoint:
        """Reads the checkpoint of `step` into the shapes, dtypes and shardings asked for.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct *with* shardings; the mesh may differ
            from the one that saved.

        Raises:
          CheckpointError: the format version or the structure differs; names every leaf.
        """
        path = self.directory / str(step)
        asked = flatten(abstract_state)
        with _orbax_context():
            run = ocp.load_checkpointables(path, {_RUN: None})[_RUN]
            if run["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: format version {run['format_version']}, this program reads "
                    f"{FORMAT_VERSION}; start from the run's model folder (init_from) in a new "
                    "workdir"
                )
            _check_structure(path, asked, ocp.checkpointables_metadata(path).metadata[_STATE])
            loaded = ocp.load_checkpointables(path, {_STATE: asked})[_STATE]
        state = jax.tree.unflatten(
            jax.tree.structure(abstract_state), [loaded[name] for name in asked]
        )
        return Checkpoint(state=state, **{part: run[part] for part in _RUN_PARTS})


def _orbax_context() -> ocp.Context:
    """Says which handler writes which part; Orbax alone would store small dicts as arrays."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_RUN)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _check_structure(path: epath.Path, asked: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises with every leaf that is missing, extra, or of another shape or dtype."""
    lines = [f"  {name}: not in the checkpoint" for name in asked if name not in saved]
    lines += [f"  {name}: in the checkpoint only" for name in saved if name not in asked]
    for name, leaf in asked.items():
        have = saved.get(name)
        if have is not None and (tuple(have.shape), have.dtype) != (tuple(leaf.shape), leaf.dtype):
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
    """Raises what `Checkpoints.restore` would raise about the newest checkpoint; reads no array.

    Nothing in the directory changes, so that a run may be writing there.

    Returns:
      (step, config of the run), or None where there is no checkpoint.
    """
    directory = epath.Path(directory)
    found = directory.iterdir() if directory.exists() else ()
    steps = [int(path.name) for path in found if path.name.isdigit()]
    if not steps:
        return None
    if not directory.is_absolute():
        directory = directory.resolve()
    path = directory / str(max(steps))
    with _orbax_context():
        run = ocp.load_checkpointables(path, {_RUN: None})[_RUN]
        saved = ocp.checkpointables_metadata(path).metadata[_STATE]
    _check_structure(path, flatten(abstract_state), saved)
    return max(steps), run["config"]
