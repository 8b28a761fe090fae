"""Commands that follow one another, as a user would type them, and the time each took."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tpo_jax.training.preemption import EXIT_STATUS

BESIDE_PRIORITY = 10  # "nice": the main steps go first


class StepFailed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, step: str, status: int, log: pathlib.Path | None):
        where = f"; see {log}" if log else ""
        super().__init__(f"[{step}] ended with status {status}{where}")
        self.status = status


class StepChanged(StepFailed):
    """A finished step is asked for with another command: its result would be taken for this one's.

    The status is that of a mistake on the command line.
    """

    def __init__(self, step: str, out: pathlib.Path, finished: str, asked: str):
        Exception.__init__(
            self,
            f"[{step}] was done in {out} by another command\n"
            f"  done:      {finished}\n  asked for: {asked}\n"
            f"Give another --out, or remove the folder {out}",
        )
        self.status = 2


def read_journal(file: pathlib.Path) -> list[dict]:
    """One record a finished step: "step", "started" (seconds of `time.time`), "seconds" on the
    clock, "cpu_seconds" of all processors, "command"."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def wall_seconds(records: Iterable[Mapping[str, Any]]) -> float:
    """How long any step was running; what ran beside another step counts once."""
    total, until = 0.0, 0.0
    for record in sorted(records, key=lambda record: record["started"]):
        end = record["started"] + record["seconds"]
        total += max(0.0, end - max(record["started"], until))
        until = max(until, end)
    return round(total, 1)


class Steps:
    """Runs commands; `out`/steps.jsonl has when each started and how many seconds it took.

    Beside the seconds on the clock, those of processor time tell what a command costs on a machine
    that does other things as well.

    A step that finished in an earlier, interrupted run is not run again; one that finished with
    another command is refused (StepChanged). Steps given to `beside` run next to those given to
    `run`, with a lower priority, in what these leave idle of two cores. Those of one lane follow
    one another. They write to `out`/logs/ instead of the terminal.
    """

    def __init__(self, out: pathlib.Path):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.journal = out / "steps.jsonl"
        # Commands that compile the same program share it.
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str((out / "compiled").absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.done: dict[str, dict] = {}
        if self.journal.exists():
            self.done = {record["step"]: record for record in read_journal(self.journal)}
        self._lock = threading.Lock()
        self._lanes: dict[str, concurrent.futures.ThreadPoolExecutor] = {}
        self._waiting: list[concurrent.futures.Future] = []
        self._running: set[int] = set()  # process ids
        self._stopped = False

    def run(self, step: str, module: str, *arguments: object) -> None:
        """Runs `python -m module arguments...`. Raises StepFailed, also of an earlier `beside`."""
        self._raise_failure()
        self._run(step, self._command(step, module, arguments), None)

    def beside(self, step: str, module: str, *arguments: object, lane: str = "beside") -> None:
        """Queues a command that only later ones of its lane need. Raises an earlier StepFailed."""
        self._raise_failure()
        command = self._command(step, module, arguments)
        worker = self._lanes.setdefault(lane, concurrent.futures.ThreadPoolExecutor(1, lane))
        log = self.out / "logs" / f"{step.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        self._waiting.append(worker.submit(self._run, step, command, log))

    def wait(self) -> None:
        """Until all queued commands are done. Raises StepFailed of the first that failed."""
        for future in self._waiting:
            future.result()

    def stop_on_sigterm(self) -> None:
        """SIGTERM to this process reaches its commands: left running, they would meet those of the
        next call. For the main thread."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())

    def stop(self) -> None:
        """Tells running commands to stop; they and later ones fail."""
        self._stopped = True
        for pid in tuple(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _raise_failure(self) -> None:
        for future in self._waiting:
            if future.done():
                future.result()

    def _command(self, step: str, module: str, arguments: tuple[object, ...]) -> list[str]:
        """As it is printed and journalled: without the interpreter. Raises StepChanged."""
        command = ["python", "-m", module, *map(str, arguments)]
        if step in self.done and self.done[step]["command"] != shlex.join(command):
            self._cancel()
            raise StepChanged(step, self.out, self.done[step]["command"], shlex.join(command))
        return command

    def _cancel(self) -> None:
        """Nothing that waits starts any more."""
        for worker in self._lanes.values():
            worker.shutdown(wait=False, cancel_futures=True)

    def _run(self, step: str, command: list[str], log: pathlib.Path | None) -> None:
        if step in self.done:
            print(f"[{step}] was done in {self.done[step]['seconds']:.0f} s", flush=True)
            return
        if self._stopped:
            raise StepFailed(step, EXIT_STATUS, log)
        print(f"\n[{step}] {shlex.join(command)}" + (f" > {log} &" if log else ""), flush=True)
        started, begin = time.time(), time.monotonic()
        with open(log, "w") if log else contextlib.nullcontext() as output:
            process = subprocess.Popen(
                [sys.executable, *command[1:]],
                env=self.environment,
                stdout=output,
                stderr=output,
            )
            if log:  # before it has started a thread: they inherit it
                os.setpriority(os.PRIO_PROCESS, process.pid, BESIDE_PRIORITY)
            self._running.add(process.pid)
            if self._stopped:  # while it was started
                os.kill(process.pid, signal.SIGTERM)
            # Of this command alone, with its own processes; several may be running.
            _, status, usage = os.wait4(process.pid, 0)
            self._running.discard(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begin
        if process.returncode:
            self._cancel()
            raise StepFailed(step, process.returncode, log)
        if log:
            print(f"\n[{step}] done in {seconds:.0f} s", flush=True)
        record = {
            "step": step, "started": started, "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime, "command": shlex.join(command),
        }  # fmt: skip
        with self._lock:
            self.done[step] = record
            with self.journal.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @property
    def seconds(self) -> dict[str, float]:
        return {step: round(record["seconds"], 1) for step, record in self.done.items()}

    @property
    def cpu_seconds(self) -> dict[str, float]:
        return {step: round(record["cpu_seconds"], 1) for step, record in self.done.items()}

    @property
    def wall_seconds(self) -> float:
        """See the function of this name."""
        return wall_seconds(self.done.values())
