import importlib.util
import json
import sys
import types

import memory_bucket
import numpy as np
import processes
import pytest
from etils import epath

from tpo_jax.data import files
from tpo_jax.training.writers import (
    Jsonl,
    StdoutProgress,
    TensorBoard,
    WeightsAndBiases,
    Writers,
    read_scalars,
)


def test_jsonl_appends_and_reads_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = Jsonl(path, resume_step=0, evaluated=0)
    writer.write_scalars(1, {"train/loss": np.float32(0.5), "count": 3})
    assert read_scalars(path) == [{"step": 1, "train/loss": 0.5, "count": 3}]  # before close
    writer.write_scalars(2, {"train/loss": float("nan")})
    writer.close()
    assert read_scalars(path)[1] == {"step": 2, "train/loss": None}


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "x"')
    writer = Jsonl(path, resume_step=2, evaluated=2)
    writer.write_scalars(3, {"x": 30})
    writer.close()
    assert [record["x"] for record in read_scalars(path)] == [1, 2, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resuming_drops_a_validation_that_the_checkpoint_has_not_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 4, "train/loss": 1.0}, {"step": 4, "validation/loss": 2.0},
        {"step": 8, "train/loss": 3.0}, {"step": 8, "validation/loss": 4.0},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Jsonl(path, resume_step=8, evaluated=4).close()
    assert read_scalars(path) == lines[:3]


def test_a_broken_record_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        Jsonl(path, resume_step=5, evaluated=5)


def test_tensorboard_writes_event_files(tmp_path):
    writer = TensorBoard(tmp_path, resume_step=0)
    writer.write_scalars(1, {"train/loss": 0.25})
    writer.close()
    (events,) = tmp_path.glob("events.*")
    assert b"train/loss" in events.read_bytes()


def test_progress_bar_shows_the_named_scalars(capsys):
    bar = StdoutProgress(total=10, initial=4, shown={"train/loss": "loss"})
    bar.write_scalars(6, {"train/loss": 1.23456, "hidden": 2.0})
    bar.flush()
    bar.close()
    shown = capsys.readouterr().err
    assert "6/10" in shown and "loss=1.235" in shown and "hidden" not in shown


def test_writers_fan_out(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    writers = Writers([Jsonl(path, resume_step=0, evaluated=0) for path in paths])
    writers.write_scalars(1, {"x": 1.0})
    writers.flush()
    writers.close()
    assert paths[0].read_text() == paths[1].read_text() != ""
    Writers([]).write_scalars(1, {"x": 1.0})  # what processes other than 0 do


def test_records_and_events_reach_a_bucket_with_every_flush(monkeypatch):
    """A bucket cannot append; what was there before a restart stays."""
    memory_bucket.install(monkeypatch)
    run = epath.Path("gs://bucket/run")
    (run / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n')
    monkeypatch.setattr(files, "SECONDS_BETWEEN_REWRITES", 1e9)
    metrics = Jsonl(run / "metrics.jsonl", resume_step=1, evaluated=1)
    writers = Writers([metrics, TensorBoard(run / "tensorboard", resume_step=1)])
    writers.write_scalars(2, {"x": 20})
    assert [r["x"] for r in read_scalars(run / "metrics.jsonl")] == [1]
    writers.flush()
    assert [r["x"] for r in read_scalars(run / "metrics.jsonl")] == [1, 20]
    monkeypatch.setattr(files, "SECONDS_BETWEEN_REWRITES", 0.0)
    writers.write_scalars(3, {"x": 30})
    assert [r["x"] for r in read_scalars(run / "metrics.jsonl")] == [1, 20, 30]
    writers.close()
    (events,) = (run / "tensorboard").iterdir()
    assert b"x" in events.read_bytes() and len(events.read_bytes()) > 100


class FakeRun:
    """What this program uses of a W&B run."""

    def __init__(self, step=0):
        self.step, self.logged, self.finished = step, [], False

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished = True


def test_wandb_goes_on_in_the_run_of_the_workdir(tmp_path, monkeypatch):
    started = []

    def init(**options):
        started.append((options, FakeRun(step=0 if not started else 21)))
        return started[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for steps in ((10, 20), (20, 30)):  # stopped after 20, resumed from a checkpoint before it
        writer = WeightsAndBiases("project", tmp_path / "run", {"seed": 1})
        for step in steps:
            writer.write_scalars(step, {"train/loss": 1.0})
        writer.close()
    (first, one), (second, other) = started
    assert first == second and first["resume"] == "allow" and first["name"] == "run"
    assert first["config"] == {"seed": 1} and first["project"] == "project"
    assert [step for step, _ in one.logged] == [10, 20] and one.finished
    assert [step for step, _ in other.logged] == [30]
    WeightsAndBiases("project", tmp_path / "other", {})
    assert started[2][0]["id"] != first["id"]


def test_wandb_is_asked_for_only_by_the_config(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="wandb='p': the package is not installed"):
        WeightsAndBiases("p", tmp_path, {})


def test_commands_load_neither_pytorch_nor_tensorflow():
    """Also where they are installed; what asks for them later gets them."""
    program = (
        "import importlib.util, sys\n"
        "import tpo_jax.convert, tpo_jax.evaluate, tpo_jax.predict, tpo_jax.preferences\n"
        "import tpo_jax.prepare, tpo_jax.train\n"
        "print([name for name in ('torch', 'tensorflow') if name in sys.modules])\n"
        "print(importlib.util.find_spec('torch') is None)"
    )
    (ended,) = processes.finish([processes.start("-c", program)])
    installed = importlib.util.find_spec("torch") is not None
    assert ended.out.splitlines() == ["[]", str(not installed)]
