"""The demo's steps, each the real command, on a handful of videos and an untrained micro model."""

import json
import subprocess
import sys

import jax
import pytest

from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.interop.folder import save_model
from tpo_jax.models import presets
from tpo_jax.models.video_language import FunctionalModel


def run_demo(*arguments):
    command = [sys.executable, "-m", "experiments.demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_missing_base_is_named(tmp_path):
    finished = run_demo("--base", tmp_path / "nothing", "--out", tmp_path / "run")
    assert finished.returncode == 2
    assert "nothing: no model folder" in finished.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_every_step_runs_and_the_summary_is_complete(tmp_path):
    codec = TextCodec(train_tokenizer(["the red circle moves left", "what happens?"], 300))
    config = presets.preset("micro", (), {})
    params = jax.jit(FunctionalModel(config).init)(jax.random.key(0))
    save_model(tmp_path / "base", config, params, codec)
    finished = run_demo("--tiny", "--base", tmp_path / "base", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["eval"]) == {"base", "stage1", "stage2", "stage3", "dpo"}
    assert summary["export"]["max_abs_difference"] == 0.0
    metrics = {
        "qa/accuracy", "temporal/r1@0.5", "temporal/miou", "highlight/hit@1", "region/acc@0.5",
        "mask/j", "mask/f", "tracking/auc", "preference/accuracy", "preference/accuracy_blind",
    }  # fmt: skip
    assert metrics <= set(summary["eval"]["dpo"])
    assert metrics - {"preference/accuracy", "preference/accuracy_blind"} <= set(summary["floors"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "http://" not in page and "https://" not in page.replace("https://www.w3.org", "")
