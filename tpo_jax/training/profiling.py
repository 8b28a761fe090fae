"""Profiler windows on demand, and the memory of the devices.

A window is a few training steps traced for xprof (TensorBoard's profile page) into
WORKDIR/profile/plugins/profile/<time>/. It opens at config.profile.start, and in any process that
is sent SIGUSR1:

    kill -USR1 PID
"""

import pathlib
import signal
import sys
import tempfile
import types
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

SIGNALLED_STEPS = 5  # length of a window that a signal opens, where the config names none


class Profiler:
    """Opens and closes windows between steps; listens for SIGUSR1 until it is closed."""

    def __init__(self, workdir: epath.PathLike, options: Mapping[str, int]) -> None:
        """`options` is config.profile."""
        self._target = epath.Path(workdir) / "profile"
        self._start, self._steps = options["start"], options["steps"]
        self._asked = False
        self._until = 0
        self._local: tempfile.TemporaryDirectory | None = None
        self._previous = signal.signal(signal.SIGUSR1, self._hear)

    def _hear(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._asked = True

    def before_step(self, step: int, last: Any) -> None:
        """Opens or closes a window before training step `step` (the first is 1).

        Args:
          last: what the step before returned; a window holds whole steps only.
        """
        if self._local is not None and step >= self._until:
            self._end_window(last)
        if self._local is None and (self._asked or 0 < self._start == step):
            self._asked = False
            self._until = step + (self._steps or SIGNALLED_STEPS)
            jax.block_until_ready(last)
            self._local = tempfile.TemporaryDirectory(prefix="profile")
            jax.profiler.start_trace(self._local.name)

    def close(self, last: Any) -> None:
        """Ends an open window (the run is over) and stops listening."""
        if self._local is not None:
            self._end_window(last)
        signal.signal(signal.SIGUSR1, self._previous)

    def _end_window(self, last: Any) -> None:
        """Moves the trace into the workdir, which may be gs://: the profiler writes local files."""
        jax.block_until_ready(last)
        jax.profiler.stop_trace()
        with self._local as folder:
            for file in sorted(pathlib.Path(folder).rglob("*.xplane.pb")):
                target = self._target / file.relative_to(folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                print(f"profile: {target}", file=sys.stderr, flush=True)
        self._local = None


def device_memory() -> dict[str, float]:
    """Bytes in use and their peak, of the fullest device of this process; {} on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"bytes_in_use": "memory/bytes_in_use", "peak_bytes_in_use": "memory/peak_bytes"}
    return {
        name: float(max(one[key] for one in stats))
        for key, name in names.items()
        if all(key in one for one in stats)
    }
