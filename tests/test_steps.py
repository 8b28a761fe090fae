"""Steps of the experiments: journal, resumption, failures, and what runs beside."""

import concurrent.futures
import json
import signal
import sys
import threading
import time

import pytest

from experiments import base, demo
from experiments.steps import StepFailed, Steps
from experiments.temporal_preference import __main__ as studies
from experiments.temporal_preference import runs

# A module of the standard library whose command line writes what it is told to.
HELLO = ("timeit", "-n1", "-r1", "print('hello')")
BROKEN = ("timeit", "-n1", "-r1", "raise ValueError")


def journal(out):
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_a_step_is_journalled_and_not_run_twice(tmp_path, capfd):
    Steps(tmp_path).run("greet", *HELLO)
    assert "hello" in capfd.readouterr().out
    (record,) = journal(tmp_path)
    assert record["step"] == "greet" and record["command"].startswith("python -m timeit -n1")
    assert 0 < record["cpu_seconds"] < record["seconds"]  # one process of one thread
    again = Steps(tmp_path)
    again.run("greet", *HELLO)
    assert "hello\n" not in capfd.readouterr().out
    assert again.seconds == {"greet": round(record["seconds"], 1)}


@pytest.mark.parametrize("ask", ["run", "beside"])
def test_a_step_that_another_command_finished_is_refused(tmp_path, ask):
    """As with `make demo` in the folder of another seed: its figures would pass for this one's."""
    Steps(tmp_path).run("greet", *HELLO)
    again = Steps(tmp_path)
    with pytest.raises(StepFailed) as failure:
        getattr(again, ask)("greet", "timeit", "-n1", "-r1", "print('moin')")
    assert failure.value.status == 2
    assert str(failure.value) == (
        f"[greet] was done in {tmp_path} by another command\n"
        """  done:      python -m timeit -n1 -r1 'print('"'"'hello'"'"')'\n"""
        """  asked for: python -m timeit -n1 -r1 'print('"'"'moin'"'"')'\n"""
        f"Give another --out, or remove the folder {tmp_path}"
    )
    assert len(journal(tmp_path)) == 1


def test_what_ran_side_by_side_counts_once(tmp_path):
    steps = Steps(tmp_path)
    times = {"a": (100.0, 10.0), "beside": (102.0, 20.0), "inside": (103.0, 2.0), "b": (200.0, 5.0)}
    steps.done = {s: {"started": start, "seconds": took} for s, (start, took) in times.items()}
    assert steps.wall_seconds == 22.0 + 5.0
    assert steps.seconds == {"a": 10.0, "beside": 20.0, "inside": 2.0, "b": 5.0}


def test_a_failing_step_stops_and_stays_undone(tmp_path):
    steps = Steps(tmp_path)
    with pytest.raises(StepFailed, match=r"\[break\] ended with status 1") as failure:
        steps.run("break", *BROKEN)
    assert failure.value.status == 1
    assert not steps.done and not (tmp_path / "steps.jsonl").exists()


def test_what_is_queued_beside_does_not_start_after_a_failure(tmp_path):
    steps = Steps(tmp_path)
    gate = tmp_path / "gate"
    wait = f"import os\nwhile not os.path.exists({str(gate)!r}): pass"
    steps.beside("wait", "timeit", "-n1", "-r1", wait)
    steps.beside("greet", *HELLO)
    try:
        with pytest.raises(StepFailed, match="break"):
            steps.run("break", *BROKEN)
    finally:
        gate.touch()
    with pytest.raises(concurrent.futures.CancelledError):
        steps.wait()
    assert [record["step"] for record in journal(tmp_path)] == ["wait"]


def test_steps_beside_write_logs_and_are_waited_for(tmp_path):
    steps = Steps(tmp_path)
    for number in range(3):
        steps.beside(f"greet {number}", *HELLO)
    steps.wait()
    assert [record["step"] for record in journal(tmp_path)] == ["greet 0", "greet 1", "greet 2"]
    assert "hello" in (tmp_path / "logs" / "greet_1.log").read_text()


def test_lanes_do_not_wait_for_each_other(tmp_path):
    steps = Steps(tmp_path)
    gate = tmp_path / "gate"
    wait = f"import os\nwhile not os.path.exists({str(gate)!r}): pass"
    steps.beside("wait", "timeit", "-n1", "-r1", wait, lane="one")
    steps.beside("open", "timeit", "-n1", "-r1", f"open({str(gate)!r}, 'w').close()", lane="two")
    steps.wait()
    assert {record["step"] for record in journal(tmp_path)} == {"open", "wait"}


def test_the_first_failure_beside_is_raised_and_nothing_runs_after_it(tmp_path):
    steps = Steps(tmp_path)
    steps.beside("break", *BROKEN)
    steps.beside("greet", *HELLO)
    with pytest.raises(StepFailed, match=r"\[break\] ended with status 1; see .*break.log"):
        steps.wait()
    with pytest.raises(StepFailed, match="break"):
        steps.run("greet too", *HELLO)
    assert not (tmp_path / "steps.jsonl").exists()


def test_told_to_stop_it_waits_for_its_commands_and_starts_no_more(tmp_path):
    steps = Steps(tmp_path)
    sleep = ("timeit", "-n1", "-r1", "import time; time.sleep(60)")
    threading.Timer(1, steps.stop).start()
    begin = time.monotonic()
    with pytest.raises(StepFailed) as failure:
        steps.run("sleep", *sleep)
    assert failure.value.status == -signal.SIGTERM and time.monotonic() - begin < 50
    with pytest.raises(StepFailed, match="status 75"):
        steps.run("greet", *HELLO)
    assert not steps.done


@pytest.mark.parametrize(
    ("command", "first", "arguments"),
    [(demo, "run", ()), (base, "render", ()), (studies, "run", ("size",))],
)
def test_sigterm_to_a_command_reaches_its_step(tmp_path, monkeypatch, command, first, arguments):
    # It tells its parent to stop, then waits to be told so itself; if nobody does, for 20 s.
    step = (
        "import os, signal; signal.alarm(20); os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    )
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append("nobody stops the steps"))

    def run(steps, *_):
        steps = steps.steps if isinstance(steps, runs.Runs) else steps
        steps.run("greet", *HELLO)
        steps.run("pause", "timeit", "-n1", "-r1", step)

    monkeypatch.setattr(command, first, run)
    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--out", str(tmp_path)])
    try:
        with pytest.raises(SystemExit) as ended:
            command.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not told and ended.value.code == -signal.SIGTERM
    assert [record["step"] for record in journal(tmp_path)] == ["greet"]
