"""The main job from end to end on the built-in world: `make demo`.

Renders videos, prepares them, post-trains the shipped base model in three stages and with
preferences, evaluates after each, measures the floors, predicts, exports and writes a report.
Each step is the command that a user would type; the report lists them with their time. Evaluations
and floors run beside the stages that follow them, in what these leave idle. The preference pairs
that the model of stage 3 makes are scored with the base and the earlier stages as well.

    python -m experiments.demo --out runs/demo --seed 0
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from experiments.steps import StepFailed, Steps
from tpo_jax.evaluation import report, summary
from tpo_jax.interop.export import largest_difference

BASE = pathlib.Path("tpo_jax/assets/tiny_base")
STAGES = ("1", "2", "3")
# Floors that are models: the base trained on the same conversations without the video, or with
# only its middle frame.
FLOORS = ("blind", "middle_frame")
# A video has up to 18 questions about regions; three of each task are enough and answered sooner.
PART = ("--calls_per_video", 3)
# One answer a side, and an eighth of the frames to manipulate with: most pairs are dropped because
# both answers are the same.
DRAW = ("--samples", 1, "--subset", 0.125)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything: videos of each split, images in all, preference pairs."""

    train: int = 600
    validation: int = 60
    test: int = 160
    images: int = 240
    train_pairs: int = 520
    test_pairs: int = 210
    judge: str = "rules"
    # Appended to the argument of configs/demo.py.
    config: str = ""


FULL = Scale()
# Seconds instead of minutes, for the tests; its figures mean nothing.
TINY = Scale(16, 8, 8, 16, 8, 4, judge="none", config=",tiny,mask_size=16")


def make_data(steps: Steps, scale: Scale, seed: int) -> None:
    """Renders the three splits and writes their tables."""
    out = steps.out
    splits = {"train": scale.train, "validation": scale.validation, "test": scale.test}
    steps.run(
        "render", "tpo_jax.data.moving_shapes", "--out", out / "world", "--seed", seed,
        "--videos", sum(splits.values()), "--images", scale.images, "--processes", 2,
        "--splits", ",".join(f"{name}:{count}" for name, count in splits.items()),
    )  # fmt: skip
    for split in ("validation", "test"):
        steps.beside(*prepare_command(out, split, processes=1), lane="prepare")
    steps.run(*prepare_command(out, "train", processes=2))
    steps.wait()


def prepare_command(out: pathlib.Path, split: str, processes: int) -> tuple[object, ...]:
    return (
        f"prepare {split}", "tpo_jax.prepare", "run", "--data", out / "world" / split,
        "--out", out / "data" / split, "--processes", processes,
    )  # fmt: skip


def stage_command(
    steps: Steps, scale: Scale, name: str, stage: str, seed: int, *more: object
) -> tuple[object, ...]:
    """The command that trains one stage and leaves its weights in OUT/name/model."""
    return (
        f"train {name}", "tpo_jax.train",
        f"--config=configs/demo.py:stage={stage},runs={steps.out}{scale.config}",
        f"--workdir={steps.out / name}", f"--config.seed={seed}", *more,
    )  # fmt: skip


def result_file(steps: Steps, name: str) -> pathlib.Path:
    return steps.out / "eval" / f"{name}.json"


def evaluate(
    steps: Steps, name: str, model: pathlib.Path, *more: object, lane: str = "evaluations"
) -> pathlib.Path:
    """Evaluates a model folder on the test split, beside; returns the file of its metrics."""
    result = result_file(steps, name)
    steps.beside(
        f"evaluate {name}", "tpo_jax.evaluate", "--model", model,
        "--data", steps.out / "data" / "test", "--out", result, *PART, *more, lane=lane,
    )  # fmt: skip
    return result


def evaluate_preferences(steps: Steps, models: dict[str, pathlib.Path], *pairs: object) -> None:
    """Scores the held-out pairs with the models before them, all by one command; beside.

    The summary adds each file to the evaluation of its stage, which was made before the pairs. In
    the lane of the floors, which is done first.
    """
    each: list[object] = []
    for stage, model in models.items():
        each += ["--model", model, "--out", result_file(steps, f"{stage}_preference")]
    steps.beside(
        "evaluate preferences", "tpo_jax.evaluate", *each,
        "--data", steps.out / "data" / "test", *pairs, "--tasks", "preference", lane="floors",
    )  # fmt: skip


def measure_floors(steps: Steps, scale: Scale, base: pathlib.Path, seed: int) -> None:
    """Best constants of the training split, and models trained without the video; beside."""
    arguments: list[object] = []
    for evidence in FLOORS:
        name = f"floor_{evidence}"
        given = (f"--config.init_from={base}", f"--config.data.evidence={evidence}")
        steps.beside(*stage_command(steps, scale, name, "floor", seed, *given), lane="floors")
        # Chosen on validation: no floor is lower because its last steps spoilt it.
        model = steps.out / name / "best_model"
        asked = ("--evidence", evidence, "--tasks", "qa")
        result = evaluate(steps, name, model, *asked, lane="floors")
        arguments += [f"--{evidence}", result]
    steps.beside(
        "floors", "tpo_jax.evaluate", "--floors_from", steps.out / "data" / "train",
        "--data", steps.out / "data" / "test", "--out", steps.out / "eval" / "floors.json",
        *PART, *arguments, lane="floors",
    )  # fmt: skip


def make_pairs(
    steps: Steps, scale: Scale, split: str, count: int, model: pathlib.Path, seed: int
) -> pathlib.Path:
    """The trained model answers about one split with right and with manipulated frames."""
    pairs = steps.out / "pairs" / split
    steps.run(
        f"pairs {split}", "tpo_jax.preferences", "generate", "--model", model,
        "--data", steps.out / "data" / split, "--out", pairs, "--pairs", count, "--seed", seed,
        "--judge", scale.judge, *DRAW,
    )  # fmt: skip
    return pairs / "pairs.jsonl"


def predict(steps: Steps, model: pathlib.Path) -> None:
    """Asks the last model about two test videos, with and without heads."""
    videos = sorted((steps.out / "world" / "test" / "videos").glob("*.mp4"))[:2]
    prompts = steps.out / "prompts.jsonl"
    queries = (steps.out / "world" / "test" / "temporal.jsonl").read_text().splitlines()
    lines = []
    for video in videos:
        query = next(q for q in map(json.loads, queries) if q["vid"] == video.stem)
        for prompt in (f'When does this happen: "{query["query"]}"?', "Describe the video."):
            lines.append({"video": str(video.absolute()), "prompt": prompt})
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps.run(
        "predict", "tpo_jax.predict", "--model", model, "--input", prompts,
        "--out", steps.out / "predictions",
    )  # fmt: skip


def export(steps: Steps, model: pathlib.Path) -> float:
    """Exports and reads back; returns the largest difference over all leaves."""
    exported, back = steps.out / "export", steps.out / "reimported"
    steps.run("export", "tpo_jax.convert", "export", "--model", model, "--out", exported)
    steps.run("import", "tpo_jax.convert", "import", "--source", exported, "--out", back)
    return largest_difference(model, back)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="rendering, splits and training")
    parser.add_argument("--base", type=pathlib.Path, default=BASE, help="model folder")
    parser.add_argument("--tiny", action="store_true", help="a few videos and steps, for tests")
    flags = parser.parse_args()
    if not (flags.base / "config.json").exists():
        parser.error(
            f"{flags.base}: no model folder; the base is trained as README.md says, "
            "or name another one with --base"
        )
    steps, scale = Steps(flags.out), TINY if flags.tiny else FULL
    steps.stop_on_sigterm()
    try:
        difference = run(steps, scale, flags.base, flags.seed)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)
    result = summary.assemble(
        steps.out, seed=flags.seed, seconds=steps.seconds, cpu_seconds=steps.cpu_seconds,
        wall_seconds=steps.wall_seconds, max_abs_difference=difference,
    )  # fmt: skip
    summary.write_summary(steps.out, result)
    page = report.build_report(steps.out)
    print(f"\n{summary.format_table(result)}\n\n{page}")


def run(steps: Steps, scale: Scale, base: pathlib.Path, seed: int) -> float:
    """All steps; returns the largest difference between the exported and the trained weights."""
    make_data(steps, scale, seed)
    evaluate(steps, "base", base)
    measure_floors(steps, scale, base, seed)
    start = (f"--config.init_from={base}",)  # later stages start from the one before
    models = {"base": base}
    for stage in STAGES:
        name = f"stage{stage}"
        steps.run(*stage_command(steps, scale, name, stage, seed, *start))
        start, models[name] = (), steps.out / name / "model"
        if stage != STAGES[-1]:  # the last waits for its pairs
            evaluate(steps, name, models[name])
    model = models.pop("stage3")
    held_out = make_pairs(steps, scale, "test", scale.test_pairs, model, seed)
    evaluate(steps, "stage3", model, "--pairs", held_out)
    evaluate_preferences(steps, models, "--pairs", held_out)
    pairs = make_pairs(steps, scale, "train", scale.train_pairs, model, seed)
    steps.run(
        "score", "tpo_jax.preferences", "score", "--model", model,
        "--data", steps.out / "data" / "train", "--pairs", pairs,
        "--out", pairs.with_name("reference.npz"),
    )  # fmt: skip
    steps.run(*stage_command(steps, scale, "dpo", "dpo", seed))
    model = steps.out / "dpo" / "model"
    evaluate(steps, "dpo", model, "--pairs", held_out)
    predict(steps, model)
    difference = export(steps, model)
    steps.wait()
    return difference


if __name__ == "__main__":
    main()
