"""The kill harness: `python -m experiments.kills`."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import kills
from tpo_jax.interop import folder

ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_run(workdir: pathlib.Path, loss: float, seconds: float) -> pathlib.Path:
    workdir.mkdir()
    record = {"step": 1, "train/loss": loss, "time/wall_seconds": seconds}
    (workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return workdir


def test_comparison_sees_weights_and_records_but_not_times(tmp_path, monkeypatch):
    weights = {}
    monkeypatch.setattr(folder, "load_model", lambda path: (None, weights[str(path)], None))
    one, two = write_run(tmp_path / "one", 1.0, 5.0), write_run(tmp_path / "two", 1.0, 6.0)
    other = write_run(tmp_path / "other", 1.0000001, 5.0)
    for run in (one, two, other):
        for name in ("model", "best_model"):
            weights[str(run / name)] = {"a": {"kernel": np.ones(3, np.float32)}}
    assert kills.compare(one, two) == ""
    assert kills.compare(one, other) == "metrics.jsonl"
    weights[str(two / "best_model")] = {"a": {"kernel": np.nextafter(np.ones(3, np.float32), 2)}}
    assert kills.compare(one, two) == "best_model: a/kernel"
    weights[str(two / "model")] = {"a": {}}
    assert kills.compare(one, two) == "model: a/kernel"


def test_the_table_counts_every_kill_once():
    rows = [
        kills.Kill(0, "save", "sigkill", 0.1, ["save"], -9, "same"),
        kills.Kill(0, "sigterm", "sigterm", 2.0, [], 75, "same"),
        kills.Kill(1, "bit_flip", "f at byte 3", 0.0, [], None, "refused, then same from ..."),
        kills.Kill(2, "truncated", "f at byte 3", 0.0, [], None, "DIFFERENT: model: a"),
    ]
    lines = kills.table(rows).splitlines()
    assert "| save | 1 | 1 | 0 | 0 |" in lines and "| bit_flip | 1 | 0 | 1 | 0 |" in lines
    assert "| truncated | 1 | 0 | 0 | 1 |" in lines and "| all | 4 | 2 | 1 | 1 |" in lines
    assert "| none of these | 1 |" in lines


@pytest.mark.long
def test_runs_that_are_killed_end_as_if_they_were_not(tmp_path):
    """Every kind of kill, and damage, at least once; see the module for what is compared."""
    command = [sys.executable, "-m", "experiments.kills", "--out", str(tmp_path), "--count", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == set(kills.KINDS)
