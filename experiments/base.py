"""Trains the shipped base model from nothing: `make base`.

Renders videos and still images, prepares them, makes a tokenizer, trains the stages of
`configs/tiny_base.py`, evaluates each on videos of the validation split, the last one on those of
the test split, and draws the losses. Run again after an interruption, it goes on where it stopped.
The model folder is OUT/videos/model.

    python -m experiments.base --out runs/base
"""

import argparse
import json
import pathlib
import sys

from matplotlib.figure import Figure

from experiments.steps import StepFailed, Steps

SEED = 1000  # far from those of the demo
VIDEOS = {"train": 5000, "validation": 160, "test": 200}
IMAGES = 1600
# A second world of still images alone.
PICTURES_SEED = 2000
PICTURES = 8200
STAGES = ("pictures", "events", "times", "videos")


def render(steps: Steps) -> None:
    steps.run(
        "render", "tpo_jax.data.moving_shapes", "--out", steps.out / "worlds" / "videos",
        "--seed", SEED, "--videos", sum(VIDEOS.values()), "--images", IMAGES, "--processes", 2,
        "--splits", ",".join(f"{split}:{count}" for split, count in VIDEOS.items()),
    )  # fmt: skip
    steps.run(
        "render pictures", "tpo_jax.data.moving_shapes", "--out", steps.out / "worlds" / "pictures",
        "--seed", PICTURES_SEED, "--videos", 0, "--images", PICTURES, "--processes", 2,
        "--splits", "train:0.976,validation:0.024",
    )  # fmt: skip


def prepare(steps: Steps) -> None:
    sources = {split: steps.out / "worlds" / "videos" / split for split in VIDEOS}
    sources["pictures"] = steps.out / "worlds" / "pictures" / "train"
    for name, source in sources.items():
        steps.run(
            f"prepare {name}", "tpo_jax.prepare", "run", "--data", source,
            "--out", steps.out / "data" / name, "--processes", 2,
        )  # fmt: skip
    steps.run(
        "tokenizer", "tpo_jax.prepare", "tokenizer", "--data", steps.out / "data" / "train",
        "--out", steps.out / "data" / "tokenizer.json",
    )  # fmt: skip


def train_and_evaluate(steps: Steps) -> None:
    for stage in STAGES:
        # What a stage lacks decides on the next one: nothing is chosen on the test split.
        split = "test" if stage == STAGES[-1] else "validation"
        steps.run(
            f"train {stage}", "tpo_jax.train",
            f"--config=configs/tiny_base.py:stage={stage},runs={steps.out}",
            f"--workdir={steps.out / stage}",
        )  # fmt: skip
        steps.run(
            f"evaluate {stage}", "tpo_jax.evaluate", "--model", steps.out / stage / "model",
            "--data", steps.out / "data" / split, "--tasks", "qa",
            "--out", steps.out / "eval" / f"{stage}.json",
        )  # fmt: skip


def draw_curves(out: pathlib.Path, stages: tuple[str, ...] = STAGES) -> pathlib.Path:
    """OUT/curve.png: training and validation loss of the stages, one axes each."""
    figure = Figure(figsize=(5 * len(stages), 3.2))
    axes = figure.subplots(1, len(stages), squeeze=False)
    for ax, stage in zip(axes[0], stages, strict=True):
        lines = (out / stage / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for name in ("train/loss", "validation/loss"):
            points = [(r["step"], r[name]) for r in records if name in r]
            ax.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
        ax.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, 1.5))
        ax.legend()
    path = out / "curve.png"
    figure.savefig(path, dpi=100, bbox_inches="tight")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.base", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/base"))
    steps = Steps(parser.parse_args().out)
    steps.stop_on_sigterm()
    try:
        render(steps)
        prepare(steps)
        train_and_evaluate(steps)
        print(draw_curves(steps.out))
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
