"""The sweep command: what it prints, skips and resumes; on a bucket; and once for real."""

import contextlib
import json
import os
import signal
import subprocess

import fake_sweep
import memory_bucket
import processes
import pytest
import swept
import tiny_run
from etils import epath
from processes import QUICK, ROOT

from experiments import sweep
from experiments.launchers.local import Local
from experiments.sweeps import report
from experiments.sweeps.runs import expand, found_in, progress
from tpo_jax.training.config_flag import read_json
from tpo_jax.training.writers import read_scalars


class FakeTraining(Local):
    """A launcher whose training does nothing and ends with the status of its seed."""

    def __init__(self, statuses):
        self.statuses = statuses

    def command(self, run):
        return ["sh", "-c", f"exit {self.statuses[run.config['seed']]}"]


def test_what_ended_and_how_is_kept_on_a_bucket(monkeypatch, tmp_path):
    """Configs, states, table and page on gs://; logs stay here."""
    memory_bucket.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    out = epath.Path("gs://bucket/rates")
    runs = expand(f"{swept.__file__}:somewhere", out)
    assert sweep.launch(FakeTraining({0: 0, 1: 3}), runs, out, parallel=2) == 1
    assert [progress(run).state for run in runs] == ["new", "failed", "new", "failed"]
    assert (out / runs[1].name / "exit_status").read_text() == "3\n"
    assert len(list((tmp_path / "runs/logs/rates").iterdir())) == 4
    for run in runs:
        assert read_json(run.config_path).seed == run.config["seed"]
        fake_sweep.write_metrics(run.workdir, 1e-3, run.config["seed"])
        fake_sweep.write_ledger(run.workdir, 100, finished=run is not runs[2])
    again = expand(f"{swept.__file__}:somewhere", out)
    assert [run.name for run in sweep.to_do(again)] == [runs[2].name]
    page = report.write(out, found_in(out))
    assert str(page) == "gs://bucket/rates/sweep.html" and "validation/loss" in page.read_text()
    assert (out / "sweep.csv").read_text().count("\n") == 5


def test_a_bad_launcher_option_writes_nothing(tmp_path):
    runs = expand(f"{swept.__file__}:somewhere", tmp_path / "out")
    with pytest.raises(ValueError, match="is needed"):
        sweep.launch(sweep.make_launcher("xpk", ""), runs, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def command(*arguments):
    """python -m experiments.sweep on the real swept.py."""
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "experiments")  # for swept.py
    path = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return processes.start("-m", "experiments.sweep", *arguments, flags=QUICK, environment=path)


def test_a_sweep_trains_what_is_not_finished(tmp_path, monkeypatch):
    """The real training, one run of four steps."""
    tiny_run.write_data(tmp_path / "data")
    file = tmp_path / "one.py"
    file.write_text("from swept import get_config\ndef sweep(add): add(seed=5)\n")
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    monkeypatch.chdir(ROOT)
    out = epath.Path(tmp_path / "out")
    (run,) = expand(f"{file}:{tmp_path / 'data'}", out)
    status = sweep.launch(Local(), sweep.to_do([run]), out, parallel=1)
    assert status == 0, (out / "logs" / "run.log").read_text()
    assert progress(run).state == "finished" and progress(run).step == 4
    assert [r["step"] for r in read_scalars(run.workdir / "metrics.jsonl")] == [1, 2, 3, 4]
    # What the sweep wrote and what `train` made of it are the same config.
    assert json.loads(run.config_path.read_text()) == run.config
    assert "train/loss" in report.write(out, [run]).read_text()
    assert sweep.to_do([run]) == []


@pytest.mark.long
def test_a_sweep_that_is_stopped_goes_on_as_if_nothing_had_been(tmp_path):
    """SIGTERM to the sweep: the run saves, the sweep ends with 75, the same command finishes it."""
    tiny_run.write_data(tmp_path / "data")
    file = tmp_path / "one.py"
    file.write_text("from swept import get_config\ndef sweep(add): add(steps=400)\n")
    given = f"--config={file}:{tmp_path / 'data'}"

    def records(out):
        found = read_scalars(tmp_path / out / "run" / "metrics.jsonl")
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found]

    process = command(given, f"--out={tmp_path / 'stopped'}")
    while len(records("stopped")) < 3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            break  # it ended by itself: the status below tells
    process.send_signal(signal.SIGTERM)
    (stopped,) = processes.finish([process])
    assert stopped.status == 75, stopped
    (run,) = found_in(tmp_path / "stopped")
    assert progress(run).state == "stopped" and 3 <= progress(run).step < 400
    for out in ("stopped", "whole"):
        (done,) = processes.finish([command(given, f"--out={tmp_path / out}")], timeout=1200)
        assert done.status == 0, done
    assert records("stopped") == records("whole") and len(records("whole")) == 400
    assert progress(run).restarts == 1
