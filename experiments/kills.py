"""Kills a training run at random moments and checks that nothing is lost or changed.

    python -m experiments.kills --out runs/kills --count 200 --seed 0

A parent process trains the micro run of the tests once without interruption. Then, trial by trial,
it starts the same run again, kills it, starts it again and so on, and lets it end; the final
weights and every record of metrics.jsonl must be bit for bit those of the undisturbed run. Where
files were damaged the run may refuse instead, with a message that names an older good checkpoint;
going on from that one must end the same.

Moments are uniform in wall-clock time: over the whole run (sigterm, sigkill), or within a phase
(save, evaluation, epoch, compile, restore) of which the parent is told by a pipe. Trial i is drawn
from (seed, i). Rows are appended to OUT/kills.jsonl and OUT/kills.md is written anew; a second call
goes on after the trials that are there.

Every run is a process of its own, forked from a parent that has imported the program but not
started JAX, so that the seconds go into training rather than imports.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY_RUN = ROOT / "tests" / "tiny_run.py"
OPTIONS = (
    "--config.checkpoint.every=3", "--config.checkpoint.keep=3", "--config.eval_every=4",
    "--config.data.threads=1",
)  # fmt: skip

SIGNALS = ("sigterm", "sigkill")
PHASES = ("save", "evaluation", "epoch", "compile", "restore")
DAMAGES = ("disk_full", "truncated", "bit_flip")
KINDS = (*SIGNALS, "save", "restore", "bit_flip", "evaluation", "save", "compile", "truncated",
         "epoch", "save", "restore", "disk_full")  # fmt: skip
CHAIN = 3  # kills of one trial before it is let run to its end
FORK = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Kill:
    """One row of the table."""

    trial: int
    kind: str
    what: str  # signal, or the file and place of the damage
    at: float  # seconds after the start of the run or of the phase, as drawn
    phases: list[str]  # that were under way
    status: int | None  # of the killed process
    outcome: str = ""


class Run:
    """One process of the train command, and the phases that it is in."""

    def __init__(self, harness: Harness, workdir: pathlib.Path, *more: str, limit: int = 0) -> None:
        self.workdir, self._reader_buffer = workdir, b""
        self._told: collections.deque[tuple[str, str]] = collections.deque()
        workdir.mkdir(parents=True, exist_ok=True)
        self.log = workdir.parent / f"{workdir.name}.log"
        self._reader, writer = os.pipe()
        self.open: collections.Counter[str] = collections.Counter()
        self.begun: collections.Counter[str] = collections.Counter()
        self.since: dict[str, float] = {}
        self.durations: dict[str, list[float]] = {}
        arguments = ["train", *harness.command, f"--workdir={workdir}", *more]
        self.start = time.monotonic()
        with self.log.open("ab") as log:
            # A limit on files must not reach the log: another process writes it.
            self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        output = self._cat.stdin.fileno()
        self._process = FORK.Process(
            target=train_here, args=(arguments, output, writer, harness.out / "compiled", limit)
        )
        self._process.start()
        os.close(writer)
        self._cat.stdin.close()

    def events(self, timeout: float) -> Iterator[tuple[str, str]]:
        """(phase, "begin" or "end") as they come, for at most `timeout` seconds."""
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            # What came together is counted together: who waits for one event may stop at it.
            while self._told:
                yield self._told.popleft()
            if not select.select([self._reader], [], [], left)[0]:
                return
            data = os.read(self._reader, 4096)
            if not data:  # the process has ended
                return
            *lines, self._reader_buffer = (self._reader_buffer + data).split(b"\n")
            for line in lines:
                phase, what = line.decode().split()
                self._count(phase, what)
                self._told.append((phase, what))

    def _count(self, phase: str, what: str) -> None:
        now = time.monotonic()
        if what == "begin":
            self.open[phase] += 1
            self.begun[phase] += 1
            self.since[phase] = now
        else:
            self.open[phase] -= 1
            self.durations.setdefault(phase, []).append(now - self.since[phase])

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Exit status; minus the signal that ended it."""
        collections.deque(self.events(3600.0), maxlen=0)
        self._process.join()
        self._cat.wait()
        os.close(self._reader)
        return self._process.exitcode

    def phases(self) -> list[str]:
        return sorted(phase for phase, count in self.open.items() if count > 0)


def train_here(
    arguments: list[str], output: int, pipe: int, cache: pathlib.Path, limit: int
) -> None:
    """The body of a run's process: the train command, which tells its phases on `pipe`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)  # the log ends when this process does
    import jax  # the parent has imported it; the back end starts here
    from absl import app

    import tpo_jax.train as command
    from tpo_jax.data.pipeline import Pipeline
    from tpo_jax.training.checkpoint import Checkpoints

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_raise_persistent_cache_errors", False)

    def tell(phase: str, what: str) -> None:
        os.write(pipe, f"{phase} {what}\n".encode())

    def told(function: Callable[..., Any], phase: str, when: Callable[..., bool] | None = None,
             begin: bool = True, end: bool = True) -> Callable[..., Any]:  # fmt: skip
        def wrapped(*args: Any, **options: Any) -> Any:
            if when is not None and not when(*args):
                return function(*args, **options)
            if begin:
                tell(phase, "begin")
            try:
                return function(*args, **options)
            finally:
                if end:
                    tell(phase, "end")
        return wrapped  # fmt: skip

    def changes_epoch(pipeline: Pipeline, step: int) -> bool:
        name, rows, _ = pipeline.plans(step)
        (entries,) = pipeline.mixtures[name].entries
        return rows[0] // len(entries) != rows[-1] // len(entries)

    command.evaluate = told(command.evaluate, "evaluation")
    command.compile_buckets = told(command.compile_buckets, "compile")
    Checkpoints.restore = told(Checkpoints.restore, "restore")
    # A save is under way from the call until its checksums are written, by another thread.
    Checkpoints.save = told(Checkpoints.save, "save", lambda c, step, *_: step not in c.steps(),
                            end=False)  # fmt: skip
    Checkpoints._finish = told(Checkpoints._finish, "save", begin=False)
    Pipeline.batch = told(Pipeline.batch, "epoch", changes_epoch)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv[:] = arguments  # where the overrides of a config file are looked for
    app.run(command.main)


class Harness:
    """The undisturbed run, the snapshot of a stopped one, and the trials."""

    def __init__(self, out: pathlib.Path, seed: int) -> None:
        self.out, self.seed = out.absolute(), seed
        self.out.mkdir(parents=True, exist_ok=True)
        data = self.out / "data"
        self.command = [f"--config={TINY_RUN}:data={data},buckets=1", *OPTIONS]
        self.rows_file = self.out / "kills.jsonl"
        self.seconds: collections.deque[float] = collections.deque(maxlen=5)  # of whole runs
        self.durations: dict[str, collections.deque[float]] = {}
        if not (data / "tokenizer.json").exists():
            shutil.rmtree(data, ignore_errors=True)
            # In a process of its own: the writer starts threads, which a fork would lose.
            process = FORK.Process(target=write_data, args=(data,))
            process.start()
            process.join()
        self.reference, self.snapshot = self.out / "reference", self.out / "snapshot"
        if not (self.reference / "model").exists():
            shutil.rmtree(self.reference, ignore_errors=True)
            self._finish(Run(self, self.reference))  # compiles
        # Now that the programs are in the cache: how long things take, and a check of the check.
        shutil.rmtree(self.out / "again", ignore_errors=True)
        self.seconds.clear()
        self.durations.clear()
        self._finish(Run(self, self.out / "again"))
        if difference := compare(self.reference, self.out / "again"):
            raise SystemExit(f"two undisturbed runs differ: {difference}")
        if not self.snapshot.exists():
            self._take_snapshot()

    def _finish(self, run: Run) -> None:
        status = run.wait()
        if status:
            raise SystemExit(f"the undisturbed run ended with {status}; see {run.log}")
        self._learn(run)

    def _learn(self, run: Run) -> None:
        """How long a run and its phases take now (other work on the machine changes it)."""
        self.seconds.append(time.monotonic() - run.start)
        for phase, durations in run.durations.items():
            self.durations.setdefault(phase, collections.deque(maxlen=9)).extend(durations)

    def _take_snapshot(self) -> None:
        """A run that SIGTERM stopped: where damage is done and restores are killed."""
        workdir, status = self.out / "stopping", 0
        while status == 0:  # it was over before it was told
            shutil.rmtree(workdir, ignore_errors=True)
            run = Run(self, workdir)
            for phase, what in run.events(3600.0):
                if (phase, what) == ("save", "end"):
                    run.kill(signal.SIGTERM)
            status = run.wait()
        if status != 75:
            raise SystemExit(f"a run that got SIGTERM ended with {status}; see {run.log}")
        workdir.rename(self.snapshot)

    def rows(self) -> list[Kill]:
        if not self.rows_file.exists():
            return []
        return [Kill(**json.loads(line)) for line in self.rows_file.read_text().splitlines()]

    def trial(self, number: int) -> list[Kill]:
        """Kills, restarts, ends and compares; returns one row a kill."""
        random = np.random.default_rng([self.seed, number])
        kind = KINDS[(number + 5 * self.seed) % len(KINDS)]
        workdir = self.out / f"trial{number}"
        for leftover in self.out.glob(f"trial{number}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if kind in DAMAGES:
            kills = [self._damage(number, kind, workdir, random)]
        else:
            if kind == "restore":
                shutil.copytree(self.snapshot, workdir)
            kills = []
            for _ in range(CHAIN):
                if (kill := self._kill(number, kind, workdir, random)) is None:
                    break
                kills.append(kill)
        outcome = self._end(workdir, refusable=kind in DAMAGES)
        for kill in kills:
            kill.outcome = outcome
        if outcome.startswith("same") or "then same" in outcome:
            shutil.rmtree(workdir)
            for log in self.out.glob(f"trial{number}*"):
                log.unlink()
        return kills

    def _kill(
        self, number: int, kind: str, workdir: pathlib.Path, random: np.random.Generator
    ) -> Kill | None:
        """Starts a run and kills it; None if it was over before."""
        name = kind if kind in SIGNALS else SIGNALS[int(random.integers(2))]
        sent = signal.SIGTERM if name == "sigterm" else signal.SIGKILL
        share, occurrence = float(random.random()), int(random.integers(1, 3))
        run = Run(self, workdir)
        if kind in SIGNALS:
            at = share * statistics.median(self.seconds)
            collections.deque(run.events(at), maxlen=0)
        else:
            at = share * statistics.median(self.durations.get(kind) or [0.3])
            for phase, what in run.events(3600.0):
                if (phase, what) == (kind, "begin") and (
                    run.begun[kind] >= occurrence or kind in ("compile", "restore")
                ):
                    break
            collections.deque(run.events(at), maxlen=0)
        phases = run.phases()
        run.kill(sent)
        status = run.wait()
        if status == 0:
            self._learn(run)
            return None
        expected = (-signal.SIGKILL,) if name == "sigkill" else (75, -signal.SIGTERM)
        if status not in expected:
            phases = [*phases, f"UNEXPECTED status, see {run.log}"]
        return Kill(number, kind, name, round(at, 3), phases, status)

    def _damage(
        self, number: int, kind: str, workdir: pathlib.Path, random: np.random.Generator
    ) -> Kill:
        shutil.copytree(self.snapshot, workdir)
        newest = max((int(p.name), p) for p in (workdir / "checkpoints").iterdir())[1]
        paths = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
        if kind == "disk_full":
            largest = max(path.stat().st_size for path in paths)
            limit = int(np.exp(random.uniform(np.log(256), np.log(1.2 * largest))))
            run = Run(self, workdir, limit=limit)
            status = run.wait()
            return Kill(number, kind, f"files of at most {limit} bytes", 0.0, [], status)
        path = paths[int(random.integers(len(paths)))]
        content = bytearray(path.read_bytes())
        where = int(random.integers(len(content)))
        if kind == "truncated":
            content = content[:where]
        else:
            content[where] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        what = f"{path.relative_to(workdir / 'checkpoints')} at byte {where}"
        return Kill(number, kind, what, 0.0, [], None)

    def _end(self, workdir: pathlib.Path, refusable: bool) -> str:
        """Lets the run end and compares; the outcome in words."""
        run = Run(self, workdir)
        status, note = run.wait(), "same"
        if status and refusable:
            advice = re.findall(r"--resume_from=(\d+)", run.log.read_text(errors="replace"))
            if not advice:
                return f"FAILED: status {status} without advice, see {run.log}"
            run = Run(self, workdir, f"--resume_from={advice[-1]}")
            status, note = run.wait(), "refused, then same from the older checkpoint"
        if status:
            return f"FAILED: status {status}, see {run.log}"
        self._learn(run)
        difference = compare(self.reference, workdir)
        return f"DIFFERENT: {difference}" if difference else note


def compare(one: pathlib.Path, two: pathlib.Path) -> str:
    """What differs between two runs; "" if they end bit for bit the same."""
    from tpo_jax.interop.folder import load_model
    from tpo_jax.parallel.paths import flatten
    from tpo_jax.training.writers import read_scalars

    for folder in ("model", "best_model"):
        (_, a, _), (_, b, _) = load_model(one / folder), load_model(two / folder)
        a, b = flatten(a), flatten(b)
        for path in a.keys() | b.keys():
            if path not in a or path not in b or not np.array_equal(a[path], b[path]):
                return f"{folder}: {path}"
    records = [
        [{k: v for k, v in record.items() if not k.startswith("time/")}
         for record in read_scalars(workdir / "metrics.jsonl")]
        for workdir in (one, two)
    ]  # fmt: skip
    return "" if records[0] == records[1] else "metrics.jsonl"


def table(rows: list[Kill]) -> str:
    """Markdown: kills by kind and outcome, and by the phases that were under way."""
    lines = ["| kind | kills | same | refused, then same | other |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys([*SIGNALS, *PHASES, *DAMAGES]):
        lines.append(_line(kind, [row for row in rows if row.kind == kind]))
    lines.append(_line("all", rows))
    phases = collections.Counter(phase for row in rows for phase in row.phases)
    for row in rows:
        phases["none of these"] += not row.phases and row.kind not in DAMAGES
    lines += ["", "| under way when killed | kills |", "|---|---|"]
    lines += [f"| {phase} | {count} |" for phase, count in sorted(phases.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: list[Kill]) -> str:
    same = sum(row.outcome == "same" for row in rows)
    refused = sum(row.outcome.startswith("refused") for row in rows)
    return f"| {name} | {len(rows)} | {same} | {refused} | {len(rows) - same - refused} |"


def write_data(folder: pathlib.Path) -> None:
    spec = importlib.util.spec_from_file_location("tiny_run", TINY_RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_data(folder)


def run_trials(out: pathlib.Path, count: int, seed: int, trials: int | None = None) -> list[Kill]:
    """Adds trials until there are `count` kills (or `trials` are done); returns all rows."""
    import tpo_jax.train  # noqa: F401  forked processes have it

    # Fast to compile; how fast it runs does not matter.
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    harness = Harness(out, seed)
    rows = harness.rows()
    number = max((row.trial for row in rows), default=-1) + 1
    while len(rows) < count and (trials is None or number < trials):
        for row in harness.trial(number):
            rows.append(row)
            with harness.rows_file.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            print(f"{len(rows)}/{count} {row}", flush=True)
        (out / "kills.md").write_text(table(rows))
        number += 1
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.kills", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="kills in all, earlier ones too")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    rows = run_trials(flags.out, flags.count, flags.seed)
    print(table(rows))
    good = all("same" in row.outcome and "UNEXPECTED" not in str(row.phases) for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
