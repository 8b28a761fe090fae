"""The main job from end to end on the built-in world: `make demo`.

Renders videos, prepares them, post-trains the shipped base model in three stages and with
preferences, evaluates after each, measures the floors, predicts, exports and writes a report.
Each step is the command that a user would type; the report lists them with their time.

    python -m experiments.demo --out runs/demo --seed 0
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

from tpo_jax.evaluation import report, summary

BASE = pathlib.Path("tpo_jax/assets/tiny_base")
CONFIG = "configs/demo.py"
STAGES = ("stage1", "stage2", "stage3")
# Floors that are models: the base trained on the same conversations without the video, or with
# only its middle frame.
FLOORS = ("blind", "middle_frame")


class Steps:
    """Runs commands one after the other and keeps each one's time in seconds.

    A step that finished in an earlier, interrupted run is not run again.
    """

    def __init__(self, out: pathlib.Path):
        self.out = out
        self.journal = out / "steps.jsonl"
        self.done: dict[str, dict] = {}
        if self.journal.exists():
            records = map(json.loads, self.journal.read_text().splitlines())
            self.done = {record["step"]: record for record in records}

    def run(self, step: str, module: str, *arguments: str) -> None:
        """Runs `python -m module arguments...`; a failing command ends the demo with its status."""
        command = ["python", "-m", module, *arguments]
        if step in self.done:
            print(f"[{step}] was done in {self.done[step]['seconds']:.0f} s", flush=True)
            return
        print(f"\n[{step}] {shlex.join(command)}", flush=True)
        start = time.monotonic()
        finished = subprocess.run([sys.executable, *command[1:]])
        if finished.returncode:
            print(f"[{step}] ended with status {finished.returncode}", file=sys.stderr)
            sys.exit(finished.returncode)
        record = {
            "step": step,
            "seconds": time.monotonic() - start,
            "command": shlex.join(command),
        }
        self.done[step] = record
        with self.journal.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @property
    def seconds(self) -> dict[str, float]:
        return {step: round(record["seconds"], 1) for step, record in self.done.items()}


def make_data(steps: Steps, seed: int) -> None:
    """Renders the three splits and writes their tables."""
    out = steps.out
    steps.run(
        "render", "tpo_jax.data.moving_shapes", f"--out={out}/videos", f"--seed={seed}",
        "--videos=620", "--images=240", "--splits=train:400,validation:60,test:160",
    )  # fmt: skip
    for split in ("train", "validation", "test"):
        steps.run(
            f"prepare/{split}", "tpo_jax.prepare", "run",
            f"--data={out}/videos/{split}", f"--out={out}/data/{split}",
        )  # fmt: skip


def train(steps: Steps, name: str, init_from: pathlib.Path, seed: int, *more: str) -> pathlib.Path:
    """Trains one stage from a model folder; returns the model folder it leaves."""
    workdir = steps.out / name
    steps.run(
        f"train/{name}", "tpo_jax.train", f"--config={CONFIG}:stage={name},data={steps.out}/data",
        f"--workdir={workdir}", f"--config.init_from={init_from}", f"--config.seed={seed}", *more,
    )  # fmt: skip
    return workdir / "model"


def evaluate(steps: Steps, name: str, model: pathlib.Path, *more: str) -> None:
    """Evaluates a model folder on the test split into `eval/<name>.json`."""
    steps.run(
        f"evaluate/{name}", "tpo_jax.evaluate", f"--model={model}",
        f"--data={steps.out}/data/test", f"--out={steps.out}/eval/{name}.json", *more,
    )  # fmt: skip


def make_pairs(steps: Steps, model: pathlib.Path, seed: int) -> None:
    """The trained model answers with right and with manipulated frames, on disjoint videos."""
    for split in ("train", "test"):
        data = f"--data={steps.out}/data/{split}"
        pairs = steps.out / "pairs" / split
        steps.run(
            f"pairs/{split}", "tpo_jax.preferences", "generate", f"--model={model}", data,
            f"--out={pairs}", f"--seed={seed}",
        )  # fmt: skip
    steps.run(
        "score", "tpo_jax.preferences", "score", f"--model={model}",
        f"--data={steps.out}/data/train", f"--pairs={steps.out}/pairs/train/pairs.jsonl",
        f"--out={steps.out}/pairs/train/reference.npz",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="rendering, splits and training")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    steps = Steps(flags.out)
    make_data(steps, flags.seed)

    for floor in FLOORS:
        model = train(steps, floor, BASE, flags.seed)
        evaluate(steps, floor, model, f"--evidence={floor}", "--tasks=qa")
    model = BASE
    evaluate(steps, "base", model, "--tasks=qa")
    for stage in STAGES:
        model = train(steps, stage, model, flags.seed)
        evaluate(steps, stage, model)

    make_pairs(steps, model, flags.seed)
    pairs = f"--pairs={steps.out}/pairs/test/pairs.jsonl"
    evaluate(steps, "stage3_preference", model, pairs, "--tasks=preference")
    model = train(steps, "dpo", model, flags.seed)
    evaluate(steps, "dpo", model, pairs)

    export = steps.out / "export"
    steps.run("predict", "tpo_jax.predict", f"--model={model}",
              f"--input={steps.out}/prompts.jsonl", f"--out={steps.out}/predictions")  # fmt: skip
    steps.run("export", "tpo_jax.convert", "export", f"--model={model}", f"--out={export}")
    steps.run("import", "tpo_jax.convert", "import", f"--source={export}",
              f"--out={steps.out}/reimported")  # fmt: skip
    print(summary, report)


if __name__ == "__main__":
    main()
