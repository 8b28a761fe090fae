"""Workdirs of a sweep as `train` leaves them, with losses from a formula."""

import json
import pathlib

import numpy as np

from experiments.sweeps.runs import Run, found_in
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores
from tpo_jax.training.config import default_config, to_dict

RATES, CLIPS, STEPS = (3e-4, 1e-3, 3e-3), (0.5, 1.0), 100


def write(out: pathlib.Path, seeds: int = 3, state: str = "finished") -> list[Run]:
    """One run for each rate, clip and seed; the second rate is the best, clip changes nothing."""
    for rate in RATES:
        for clip in CLIPS:
            for seed in range(seeds):
                config = default_config()
                config.update(seed=seed, steps=STEPS, trainable=[[".*", rate]])
                config.optimizer.clip = clip
                workdir = out / f"trainable.0.1={rate:g},clip={clip:g},seed={seed}"
                workdir.mkdir(parents=True)
                (workdir / "config.json").write_text(json.dumps(to_dict(config)))
                write_metrics(workdir, rate, seed)
                write_ledger(workdir, STEPS, state == "finished")
    return found_in(out)


def write_metrics(workdir: pathlib.Path, rate: float, seed: int) -> None:
    noise = np.random.default_rng([seed, int(1e6 * rate)])
    lines = []
    for step in range(10, STEPS + 1, 10):
        loss = 0.5 + abs(np.log10(rate) + 3) + 2.0 * np.exp(-step / 30) + 0.1 * seed
        record = {"step": step, "train/loss": loss + 0.02 * noise.normal(),
                  "train/nothing": None, "time/steps_per_second": 8.0}  # fmt: skip
        lines.append(record)
        if step % 50 == 0:
            lines.append({"step": step, "validation/loss": loss + 0.1,
                          "validation/token_accuracy": 1 / (1 + loss)})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


def write_ledger(workdir: pathlib.Path, step: int, finished: bool) -> None:
    ledger = {"seconds": {"step": 1.0}, "goodput": 0.9, "step": step, "restarts": 1,
              "best": None, "finished": finished}  # fmt: skip
    (workdir / "ledger.json").write_text(json.dumps(ledger))


def write_evaluation(workdir: pathlib.Path, values: list[float]) -> None:
    """eval.json with one item a video."""
    scores = ItemScores.of((f"q{i}", f"v{i}", value) for i, value in enumerate(values))
    record = results.evaluation_record({"qa/accuracy": scores}, routing={}, about={})
    results.write_json(workdir / "eval.json", record)
