"""Several processes (gloo) train as one does; SIGTERM to one stops all of them at the same step."""

import functools
import json
import os
import random
import re
import shutil
import signal

import numpy as np
import processes
import pytest
import tiny_run

from tpo_jax.interop.folder import load_model
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.preemption import EXIT_STATUS
from tpo_jax.training.writers import read_scalars

STEPS = 12
SEED = "TPO_SIGNAL_SEED"  # of which process is told to stop, and when; drawn anew in every run

# The train command, and a signal to oneself when the batch of a given step is at hand.
PROGRAM = """
import os, sys
import tpo_jax.train
from absl import app

at, signum, real = int(sys.argv.pop(1)), int(sys.argv.pop(1)), tpo_jax.train.global_batch
seen = iter(range(10**6))
def global_batch(local, mesh):
    if next(seen) == at:
        os.kill(os.getpid(), signum)
    return real(local, mesh)
tpo_jax.train.global_batch = global_batch
app.run(tpo_jax.train.main)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


def start(
    data, workdir, *, devices=2, count=1, signal_at=None, signal_to=-1, signum=signal.SIGTERM,
    buckets=1, options=(),
):  # fmt: skip
    """Starts the run on devices that `count` processes share; returns the processes.

    With `signal_at`, process `signal_to` (-1: the last) sends itself the signal at that batch,
    counted from 0.
    """
    port = processes.free_port()
    running = []
    for index in range(count):
        several = [
            f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}",
        ]  # fmt: skip
        running.append(processes.start(
            "-c", PROGRAM, -1 if signal_at is None or index != signal_to % count else signal_at,
            int(signum),
            f"--config=tests/tiny_run.py:data={data},steps={STEPS},buckets={buckets}",
            f"--workdir={workdir}", "--config.log_every=1", "--config.eval_every=0",
            f"--config.mesh.data={devices}", *options,
            *(several if count > 1 else []),
            # Only process 0 writes the compile cache, so process 1 compiles in every run.
            flags=f"--xla_force_host_platform_device_count={devices // count} {processes.QUICK}",
        ))  # fmt: skip
    return running


def finish(running) -> list[int]:
    """Exit statuses."""
    return [process.status for process in processes.finish(running)]


def metrics(workdir) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_scalars(workdir / "metrics.jsonl")
    ]


def assert_close(one: list[dict], two: list[dict]) -> None:
    """Equal up to round-off, which training amplifies from step to step."""
    assert [(r["step"], r.keys()) for r in one] == [(r["step"], r.keys()) for r in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=f"{a} {b}")


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """An uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("together")
    assert finish(start(data, workdir, count=2)) == [0, 0]
    return workdir


def test_two_processes_give_the_losses_of_one(data, together, tmp_path):
    assert finish(start(data, tmp_path)) == [0]
    one, two = metrics(tmp_path), metrics(together)
    assert_close(one, two)
    # The first steps have not had the time to drift apart: equal to round-off.
    np.testing.assert_allclose(one[0]["train/loss"], two[0]["train/loss"], rtol=1e-6)


def draw_signal() -> tuple[int, int]:
    """(process, batch) of this run; those of another run with its seed, which pytest shows."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
    drawn = random.Random(seed)
    process, batch = drawn.randrange(2), drawn.randrange(8)  # of 12: it is heard before the end
    print(f"{SEED}={seed}: SIGTERM to process {process} at batch {batch}")
    return process, batch


def test_both_processes_and_all_batches_are_drawn(monkeypatch):
    drawn = set()
    for seed in range(100):
        monkeypatch.setenv(SEED, str(seed))
        drawn.add(draw_signal())
        assert draw_signal() in drawn
    assert drawn == {(process, batch) for process in range(2) for batch in range(8)}


def test_sigterm_to_one_stops_both_at_one_step_and_the_restart_continues(data, together, tmp_path):
    stopped, alone = tmp_path / "stopped", tmp_path / "alone"
    process, batch = draw_signal()
    first = finish(start(data, stopped, count=2, signal_at=batch, signal_to=process))
    assert first == [EXIT_STATUS, EXIT_STATUS]
    step = json.loads((stopped / "ledger.json").read_text())["step"]
    saved = sorted(int(path.name) for path in (stopped / "checkpoints").iterdir())
    # Heard while that batch was trained on; the service agrees on a poll that nobody has passed.
    assert batch < step < STEPS and saved[-1] == step == metrics(stopped)[-1]["step"]
    shutil.copytree(stopped, alone)

    assert finish(start(data, stopped, count=2)) == [0, 0]
    assert metrics(stopped) == metrics(together)
    (_, a, _), (_, b, _) = load_model(stopped / "model"), load_model(together / "model")
    for path, leaf in flatten(a).items():
        np.testing.assert_array_equal(leaf, flatten(b)[path], err_msg=path)

    # Another number of processes reads the same batches.
    assert finish(start(data, alone)) == [0]
    assert_close(metrics(alone), metrics(together))


@pytest.mark.long
def test_four_processes_then_two_then_eight_give_the_losses_of_one(data, tmp_path):
    """On eight devices each time; two buckets, a row of each on every device."""
    eight_rows = ("--config.buckets.long.batch_size=8", "--config.buckets.short.batch_size=8")
    run = functools.partial(start, data, devices=8, buckets=2, options=eight_rows)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert finish(run(whole)) == [0]
    stopped_at = []
    for count, signal_at in ((4, 2), (2, 2), (8, None)):
        ended = finish(run(moved, count=count, signal_at=signal_at))
        assert ended == [0 if signal_at is None else EXIT_STATUS] * count
        stopped_at.append(metrics(moved)[-1]["step"])
    assert 3 <= stopped_at[0] < stopped_at[1] < stopped_at[2] == STEPS
    one, several = metrics(whole), metrics(moved)
    assert_close(one, several)
    np.testing.assert_allclose(one[0]["train/loss"], several[0]["train/loss"], rtol=1e-6)


@pytest.mark.long
def test_killed_and_without_the_disk_of_one_host_it_goes_on_from_the_other(
    data, together, tmp_path
):
    """A local save every step; process 1 dies during step 8, and comes back on an empty machine."""
    workdir, local = tmp_path / "run", tmp_path / "local"
    options = (f"--config.checkpoint.local_dir={local}", "--config.checkpoint.local_every=1")
    running = start(
        data, workdir, count=2, signal_at=7, signum=signal.SIGKILL, options=options
    )
    assert running[1].wait(timeout=600) == -signal.SIGKILL
    running[0].kill()
    finish(running)
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [5]
    (lost,) = local.glob("*/process_1")
    assert {path.name for path in lost.iterdir()} >= {"6"}
    shutil.rmtree(lost)

    again = start(data, workdir, count=2, options=options)
    ended = processes.finish(again)
    assert [process.status for process in ended] == [0, 0]
    assert "process 1: has no files; taken from process 0" in ended[0].err
    assert re.search(r"going on from the local checkpoint of step [67]\n", ended[0].err)
    assert metrics(workdir) == metrics(together)
    (_, a, _), (_, b, _) = load_model(workdir / "model"), load_model(together / "model")
    for path, leaf in flatten(a).items():
        np.testing.assert_array_equal(leaf, flatten(b)[path], err_msg=path)
    assert list(local.rglob("*.safetensors")) == []  # the run is over
