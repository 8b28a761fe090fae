"""Where scalars go: progress bar, JSONL file, TensorBoard, W&B. Process 0 writes, others do not.

All writers have the method names of clu.metric_writers (which needs TensorFlow):
`write_scalars(step, scalars)`, `flush()`, `close()`. Names are "group/term", values plain floats.
"""

import hashlib
import importlib
import json
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from etils import epath

from tpo_jax.data.files import Lines, is_remote
from tpo_jax.errors import UserError
from tpo_jax.parallel.weighted_sum import WeightedSum


def _tensorboard() -> types.ModuleType:
    """tensorboardX without PyTorch, which it loads where it finds it: half of a program's start."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # whose import then fails, as where it is not installed
    try:
        return importlib.import_module("tensorboardX")
    finally:
        if hidden:
            del sys.modules["torch"]


tensorboardX = _tensorboard()


class Writer(Protocol):
    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class StdoutProgress:
    """A progress bar over all steps; `shown` maps a scalar's name to its label beside the bar."""

    def __init__(self, *, total: int, initial: int, shown: Mapping[str, str]) -> None:
        self._bar = tqdm.tqdm(
            total=total, initial=initial, desc="train", unit="step", dynamic_ncols=True
        )
        self._shown = dict(shown)
        self._latest: dict[str, str] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, label in self._shown.items():
            if name in scalars:
                self._latest[label] = f"{scalars[name]:.4g}"
        self._bar.set_postfix(self._latest, refresh=False)
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)

    def flush(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class Jsonl:
    """One JSON object a line: {"step": 10, "train/loss": 1.25, ...}.

    A run that resumes at step n will write the steps after n again, and the validation of step n if
    the checkpoint was written before it. Opening drops both: the file of an interrupted run ends up
    equal to that of an uninterrupted one.
    """

    def __init__(self, path: epath.PathLike, *, resume_step: int, evaluated: int) -> None:
        """Opens `path` for appending after the records up to `resume_step`.

        Args:
          evaluated: the last step whose validation the checkpoint knows of.
        """
        self._lines = Lines(path, [
            line
            for step, line in read_lines(path)
            if step <= (evaluated if '"validation/' in line else resume_step)
        ])  # fmt: skip

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        record = {"step": step} | {name: _number(value) for name, value in scalars.items()}
        self._lines.append(json.dumps(record))

    def flush(self) -> None:
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


def read_lines(path: epath.PathLike) -> list[tuple[int, str]]:
    """(step, line) of every record of a metrics.jsonl; a torn last line is left out.

    Raises:
      ValueError: another line is not JSON with a step; names file and line number.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    text = path.read_text()
    # A line without its end was being written when the process was killed.
    lines = text.split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a metrics record ({error}); expected "
                '{"step": int, name: number, ...}; repair or remove the file'
            ) from error
    return records


def read_scalars(path: epath.PathLike) -> list[dict[str, float]]:
    """All records of a metrics.jsonl as dicts."""
    return [json.loads(line) for _, line in read_lines(path)]


class TensorBoard:
    """Event files for TensorBoard under `directory`; steps after `resume_step` are superseded.

    Those of a bucket are written here, and copied with every flush.
    """

    def __init__(self, directory: epath.PathLike, *, resume_step: int) -> None:
        self._directory = epath.Path(directory)
        remote = is_remote(self._directory)
        self._local = tempfile.TemporaryDirectory(prefix="tensorboard") if remote else None
        self._writer = tensorboardX.SummaryWriter(
            self._local.name if remote else str(directory),
            purge_step=resume_step + 1,
            write_to_disk=True,
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        if self._local is not None:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for file in epath.Path(self._local.name).iterdir():
            (self._directory / file.name).write_bytes(file.read_bytes())


class WeightsAndBiases:
    """A run of Weights & Biases; needs `pip install wandb` and a login.

    The run's id comes from the workdir, so that a restart goes on in the same run. Steps that were
    logged before the restart are not logged again: W&B takes increasing steps only.
    """

    def __init__(self, project: str, workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"wandb={project!r}: the package is not installed; pip install wandb, or leave "
                "config.wandb empty"
            ) from error
        workdir = epath.Path(workdir)
        where = workdir if workdir.is_absolute() else workdir.resolve()
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=hashlib.sha256(str(where).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(config),
        )
        self._last = self._run.step - 1

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if step > self._last:
            self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """W&B sends on its own."""

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Several writers as one; an empty one is what processes other than 0 use."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _number(value: float) -> float | int | None:
    """JSON has no NaN: a loss that is not finite is written as null, which plots as a gap."""
    value = value.item() if isinstance(value, np.generic | np.ndarray) else value
    return value if np.isfinite(value) else None


class MetricWindow:
    """Sums of training metrics since the last record, and the record.

    Metrics are {name: WeightedSum} per step. Totals and weights add up over the steps of a window
    and are divided once; a metric whose weight is 0 in the whole window has no value.
    """

    def __init__(self, saved: Mapping[str, Sequence[float]] | None = None) -> None:
        """`saved` is `state()` of an interrupted window, which this one continues."""
        self._sums = {name: (total, weight) for name, (total, weight) in (saved or {}).items()}

    def add(self, metrics: Mapping[str, WeightedSum]) -> None:
        """Adds one step; blocks until the step is done."""
        for name, value in jax.device_get(dict(metrics)).items():
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + float(value.total), weight + float(value.weight))

    def means(self, prefix: str) -> dict[str, float]:
        """{prefix + name: total / weight}."""
        return {
            prefix + name: total / weight for name, (total, weight) in self._sums.items() if weight
        }

    def state(self) -> dict[str, list[float]]:
        """JSON for the checkpoint; floats survive it exactly."""
        return {name: list(sums) for name, sums in self._sums.items()}
