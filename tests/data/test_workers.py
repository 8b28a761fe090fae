"""Workers of a program that is killed."""

import concurrent.futures
import importlib
import os
import select
import signal
import subprocess
import sys

import pytest

from tpo_jax.data import pipeline
from tpo_jax.data.ingest import run

# A worker that is asked for its process id, and a program that waits until it is killed.
PROGRAM = """
import concurrent.futures, multiprocessing, os, signal
from tpo_jax.data.workers import end_with_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, {start}) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        signal.pause()
"""


@pytest.mark.parametrize(("start", "ends"), [("end_with_parent", True), ("None", False)])
def test_a_worker_ends_with_a_parent_that_is_killed(start, ends, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(start=start))
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as program:  # fmt: skip
        worker = int(program.stdout.readline())
        handle = os.pidfd_open(worker)
        program.kill()
    try:
        # Readable once the process has ended. Without the watch it never does.
        readable, _, _ = select.select([handle], [], [], 60 if ends else 1)
        assert bool(readable) == ends
    finally:
        if not readable:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def test_every_pool_starts_its_workers_so(monkeypatch):
    class Started(Exception):
        pass

    def watched():
        raise Started

    def pool(processes, context, initializer, arguments=()):
        initializer(*arguments)

    build = importlib.import_module("tpo_jax.data.moving_shapes.build")  # a function has the name
    for module in (pipeline, run, build):
        monkeypatch.setattr(module, "end_with_parent", watched)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", pool)
    with pytest.raises(Started):
        build._run_all([], 2, print)
    with pytest.raises(Started):
        pipeline._WorkerSteps(None, 2)
    with pytest.raises(Started):
        list(run._results([], None, None, 2))
