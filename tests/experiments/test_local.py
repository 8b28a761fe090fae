"""The local launcher: restarts on 75 only, N at a time, and what a signal does."""

import os
import signal

import pytest

from experiments.launchers.local import Job, Pool


def job(tmp_path, name, script):
    return Job(name, ["sh", "-c", script], tmp_path / "logs" / f"{name}.log")


def run(jobs, parallel=1):
    """(statuses, [(name, status) of every process], whether it was stopped)."""
    ended = []
    with Pool(parallel, say=lambda text: None) as pool:
        statuses = pool.run(jobs, lambda name, status: ended.append((name, status)))
        return statuses, ended, pool.stopping


def test_only_status_75_is_started_again(tmp_path):
    jobs = [
        job(tmp_path, "saved", f"cd {tmp_path}; echo x >> n; [ $(wc -l < n) -gt 2 ] || exit 75"),
        job(tmp_path, "broken", "echo broken; exit 3"),
        job(tmp_path, "killed", "kill -KILL $$"),
        job(tmp_path, "good", "true"),
    ]
    statuses, ended, stopped = run(jobs)
    assert statuses == {"saved": 0, "broken": 3, "killed": -signal.SIGKILL, "good": 0}
    assert ended == [
        ("saved", 75), ("saved", 75), ("saved", 0), ("broken", 3), ("killed", -9), ("good", 0),
    ]  # fmt: skip
    assert not stopped
    assert (tmp_path / "logs" / "broken.log").read_text() == "broken\n"


def test_as_many_run_at_a_time_as_asked_for(tmp_path):
    """Each of two jobs needs the other to be running; a lock shows that one at a time is one."""
    os.mkfifo(tmp_path / "a")
    os.mkfifo(tmp_path / "b")
    pair = [job(tmp_path, "one", f"cd {tmp_path}; echo > a; cat b"),
            job(tmp_path, "two", f"cd {tmp_path}; cat a; echo > b")]  # fmt: skip
    assert run(pair, parallel=2)[0] == {"one": 0, "two": 0}
    alone = f"cd {tmp_path}; mkdir lock || exit 9; cat /dev/null; rmdir lock"
    jobs = [job(tmp_path, str(i), alone) for i in range(6)]
    assert set(run(jobs, parallel=1)[0].values()) == {0}


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_signal_stops_the_children_with_sigterm_and_starts_nothing_more(tmp_path, number):
    handler = signal.getsignal(signal.SIGTERM)
    child = f"trap 'kill $!; exit 75' TERM; sleep 100 & kill -{number} $PPID; wait"
    statuses, ended, stopped = run([job(tmp_path, "first", child), job(tmp_path, "next", "true")])
    assert statuses == {"first": 75} and ended == [("first", 75)] and stopped
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_second_signal_kills(tmp_path):
    child = "trap 'kill -TERM $PPID' TERM; kill -TERM $PPID; while :; do :; done"
    statuses, _, _ = run([job(tmp_path, "stubborn", child)])
    assert statuses == {"stubborn": -signal.SIGKILL}
