"""Processes on this machine, N at a time; each is started again after status 75 and only then.

SIGTERM or SIGINT to the launcher is passed on to every process as SIGTERM: each saves and ends with
75, and nothing is started any more. A second signal kills them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence

from experiments.launchers.command import train_command
from experiments.sweeps.runs import Run
from tpo_jax.training.preemption import EXIT_STATUS


@dataclasses.dataclass(frozen=True)
class Job:
    """A command, and the file that its output is appended to."""

    name: str
    command: Sequence[str]
    log: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Local:
    """No options."""

    follows = True

    def command(self, run: Run) -> list[str]:
        return train_command(run, sys.executable)


class Pool:
    """Runs jobs, `parallel` at a time (a context manager: it listens for signals while open)."""

    def __init__(self, parallel: int, say: Callable[[str], None] = print) -> None:
        self._parallel, self._say = parallel, say
        # Around `stopping` and `_processes`. The main thread takes it in `_hear` alone, but one
        # signal may come into the handler of another.
        self._lock = threading.RLock()
        self._processes: set[subprocess.Popen] = set()
        self._previous: dict[int, object] = {}
        self.stopping = False

    def __enter__(self) -> Pool:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, signum: int, frame: types.FrameType | None) -> None:
        """Runs on the main thread, which otherwise only waits for the others."""
        del frame
        with self._lock:
            again, self.stopping = self.stopping, True
            for process in self._processes:
                process.kill() if again else process.terminate()
        name = signal.Signals(signum).name
        self._say(f"{name}: {'killing' if again else 'stopping'} {len(self._processes)} runs")

    def run(
        self, jobs: Sequence[Job], ended: Callable[[str, int], None] = lambda name, status: None
    ) -> dict[str, int]:
        """{name: exit status} of the jobs that were started.

        Args:
          ended: told of every process that ends, from a thread of its own.
        """
        with concurrent.futures.ThreadPoolExecutor(self._parallel) as threads:
            futures = {job.name: threads.submit(self._run, job, ended) for job in jobs}
            # A signal that the kernel gives to another thread is heard when this one wakes up.
            while concurrent.futures.wait(futures.values(), timeout=0.5).not_done:
                pass
            statuses = {name: future.result() for name, future in futures.items()}
        return {name: status for name, status in statuses.items() if status is not None}

    def _run(self, job: Job, ended: Callable[[str, int], None]) -> int | None:
        """The last exit status of a job; None if it was not started."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        status = None
        while status in (None, EXIT_STATUS):
            process = self._start(job)
            if process is None:
                break
            status = process.wait()
            with self._lock:
                self._processes.discard(process)
            ended(job.name, status)
            what = {0: "finished", EXIT_STATUS: "saved and stopped (status 75)"}
            self._say(f"[{job.name}] {what.get(status, f'FAILED with status {status}')}")
        return status

    def _start(self, job: Job) -> subprocess.Popen | None:
        with self._lock, job.log.open("ab") as log:
            if self.stopping:
                return None
            # A session of its own: Ctrl-C in a terminal reaches the launcher alone, which decides.
            process = subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
        self._say(f"[{job.name}] started, process {process.pid}, log {job.log}")
        return process
