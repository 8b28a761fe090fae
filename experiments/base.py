"""Trains the shipped base model from nothing: `make base`.

Renders videos and still images, prepares them, makes a tokenizer, trains `configs/tiny_base.py` and
evaluates the result beside what a model without the video reaches. About two hours on two cores;
run again after an interruption, it goes on where it stopped. The model folder is OUT/run/model.

    python -m experiments.base --out runs/base
"""

import argparse
import pathlib
import sys

from experiments.steps import StepFailed, Steps

SEED = 1000  # far from those of the demo
VIDEOS = {"train": 5000, "validation": 160, "test": 200}
IMAGES = 1600
# A second world of still images alone.
PICTURES_SEED = 2000
PICTURES = 8200


def render(steps: Steps) -> None:
    steps.run(
        "render", "tpo_jax.data.moving_shapes", "--out", steps.out / "world", "--seed", SEED,
        "--videos", sum(VIDEOS.values()), "--images", IMAGES, "--processes", 2,
        "--splits", ",".join(f"{split}:{count}" for split, count in VIDEOS.items()),
    )  # fmt: skip
    steps.run(
        "render pictures", "tpo_jax.data.moving_shapes", "--out", steps.out / "pictures",
        "--seed", PICTURES_SEED, "--videos", 0, "--images", PICTURES, "--processes", 2,
        "--splits", "train:0.976,validation:0.024",
    )  # fmt: skip


def prepare(steps: Steps) -> pathlib.Path:
    data = steps.out / "data"
    sources = {split: steps.out / "world" / split for split in VIDEOS}
    sources["pictures"] = steps.out / "pictures" / "train"
    for name, source in sources.items():
        steps.run(
            f"prepare {name}", "tpo_jax.prepare", "run", "--data", source, "--out", data / name,
            "--processes", 2,
        )  # fmt: skip
    steps.run(
        "tokenizer", "tpo_jax.prepare", "tokenizer", "--data", data / "train",
        "--out", data / "tokenizer.json",
    )  # fmt: skip
    return data


def train_and_evaluate(steps: Steps, data: pathlib.Path) -> None:
    run = steps.out / "run"
    steps.run(
        "train", "tpo_jax.train", f"--config=configs/tiny_base.py:data={data}", f"--workdir={run}"
    )
    steps.run(
        "evaluate", "tpo_jax.evaluate", "--model", run / "model", "--data", data / "test",
        "--tasks", "qa", "--out", steps.out / "evaluation.json",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/base"))
    steps = Steps(parser.parse_args().out)
    try:
        render(steps)
        train_and_evaluate(steps, prepare(steps))
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
