"""The demo's steps, each the real command, on a handful of videos and a micro model."""

import json

import pytest
from processes import QUICK, finish, start
from promised_metrics import METRICS, PREFERENCE


def run(module, *arguments):
    (ended,) = finish([start("-m", module, *arguments, flags=QUICK)], timeout=1800)
    return ended


def run_demo(*arguments):
    return run("experiments.demo", *arguments)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A micro model that has learnt to answer in sentences, if seldom in true ones."""
    out = tmp_path_factory.mktemp("base")
    data = out / "data"
    commands = [
        ("tpo_jax.data.moving_shapes", "--out", out / "world", "--videos", 40, "--seed", 1000,
         "--splits", "train:32,validation:8"),
        *(("tpo_jax.prepare", "run", "--data", out / "world" / split, "--out", data / split)
          for split in ("train", "validation")),
        ("tpo_jax.prepare", "tokenizer", "--data", data / "train",
         "--out", data / "tokenizer.json"),
        ("tpo_jax.train", f"--config=configs/tiny_base.py:runs={out},tiny", "--config.steps=300",
         "--config.eval_every=0", "--config.checkpoint.every=300", f"--workdir={out}/run"),
    ]  # fmt: skip
    for command in commands:
        ended = run(*command)
        assert ended.status == 0, ended.out
    return out / "run" / "model"


def test_a_missing_base_is_named(tmp_path):
    ended = run_demo("--base", tmp_path / "nothing", "--out", tmp_path / "run")
    assert ended.status == 2
    assert "nothing: no model folder" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_every_step_runs_and_the_summary_is_complete(base, tmp_path):
    ended = run_demo("--tiny", "--base", base, "--out", tmp_path / "run")
    assert ended.status == 0, ended.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["eval"]) == {"base", "stage1", "stage2", "stage3", "dpo"}
    assert summary["export"]["max_abs_difference"] == 0.0
    assert set(summary["eval"]["dpo"]) >= METRICS
    assert all(set(metrics) >= PREFERENCE for metrics in summary["eval"].values())
    for trained in summary["floor_training"].values():
        assert [at["step"] for at in trained["validations"]] == [2, 4]
        assert trained["chosen_step"] in (2, 4)
    assert set(summary["floor_training"]) == {"floor_blind", "floor_middle_frame"}
    assert set(summary["floors"]) >= METRICS
    page = (tmp_path / "run" / "report.html").read_text()
    assert "http://" not in page and "https://" not in page.replace("https://www.w3.org", "")
