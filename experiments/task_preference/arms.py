"""Trains and evaluates the arms of configs/task_preference.py with the commands of the demo.

Seeds are runs of their own, of one program, which runs of one shape share through OUT/compiled. One
program with an axis of seeds would be another to compile; what it takes a seed, beside a step of
one, is timed by experiments/benchmarks/vmapped_seeds.py. Studies share data, arms and floors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import demo
from experiments.steps import StepFailed, Steps
from experiments.task_preference import page
from experiments.task_preference.trained import trained
from tpo_jax.data import files
from tpo_jax.evaluation import results
from tpo_jax.evaluation.summary import describe_device, versions

RESULTS = pathlib.Path("experiments/results/task_preference")
CONFIG = pathlib.Path("configs/task_preference.py")
ARMS = runpy.run_path(str(CONFIG))["ARMS"]
# Fewer videos than the demo has, and no images: an evaluation is most of what a run costs.
FULL = demo.Scale(train=480, validation=60, test=100, images=0)
TINY = dataclasses.replace(demo.TINY, images=0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the command line: see `parser`.

    The runs in `out` belong to one choice of the base, videos, steps and tiny; see `check`.
    """

    out: pathlib.Path
    results: pathlib.Path
    base: pathlib.Path
    seeds: int
    videos: int
    steps: float
    tiny: bool

    def check(self) -> None:
        """Writes what decides the runs into `out`; ValueError if those there were others."""
        mine = {name: getattr(self, name) for name in ("videos", "steps", "tiny")}
        mine |= {"base": str(self.base)}
        file = self.out / "options.json"
        if not file.exists():
            files.write(file, json.dumps(mine) + "\n")
        elif (theirs := json.loads(file.read_text())) != mine:
            raise ValueError(
                f"--out {self.out}: has runs of {theirs}, expected {mine}; use another"
            )


class Study:
    """The runs of one study, OUT/seed<n>/<arm>; data and finished steps are shared."""

    def __init__(self, options: Options):
        self.options = options
        self.scale = TINY if options.tiny else dataclasses.replace(FULL, train=options.videos)
        self._steps: dict[int, Steps] = {}

    @property
    def seeds(self) -> range:
        return range(self.options.seeds)

    def steps(self, seed: int) -> Steps:
        """The steps of a seed, which has its own videos; the first call renders them."""
        if seed not in self._steps:
            steps = Steps(self.options.out / f"seed{seed}")
            cache = self.options.out / "compiled"
            steps.environment["JAX_COMPILATION_CACHE_DIR"] = str(cache.absolute())
            self._steps[seed] = steps
            demo.make_data(steps, self.scale, seed)
        return self._steps[seed]

    def train(
        self, seed: int, arm: str, *, rate: float = 1.0, init: pathlib.Path | None = None,
        data: str = "data",
    ) -> pathlib.Path:  # fmt: skip
        """Trains an arm; returns its model folder, OUT/seed<n>/<arm>/model.

        Args:
          rate: multiplies all learning rates; another than 1 is part of the folder's name.
          init: model folder to start from; None for the base.
          data: folder beside the arms.
        """
        steps = self.steps(seed)
        workdir = steps.out / run_name(arm, rate)
        steps.run(f"train {workdir.name}", *self._training(steps, arm, workdir, rate, init, data),
                  f"--config.seed={seed}")  # fmt: skip
        return workdir / "model"

    def _training(
        self, steps: Steps, arm: str, workdir: pathlib.Path, rate: float = 1.0,
        init: pathlib.Path | None = None, data: str = "data",
    ) -> tuple[object, ...]:  # fmt: skip
        argument = f"arm={arm},data={steps.out / data},init={init or self.options.base}"
        argument += f",rate={rate:g},steps={self.options.steps:g}{',tiny' * self.options.tiny}"
        return "tpo_jax.train", f"--config={CONFIG}:{argument}", f"--workdir={workdir}"

    def evaluate(
        self, seed: int, arm: str, model: pathlib.Path, split: str = "test", *, name: str = "",
        lane: str = "evaluations",
    ) -> pathlib.Path:  # fmt: skip
        """Asks a model what its arm is asked, beside the next training; returns the metrics' file.

        Args:
          arm: whose tasks and evidence; `text` is read in its words.
          name: of the file; by default the folder of the run.
        """
        steps, name = self.steps(seed), name or model.parent.name
        result = steps.out / "eval" / f"{name}_{split}.json"
        asked = ["qa" if task == "conversation" else task for task in ARMS[arm].tasks]
        steps.beside(
            f"evaluate {name} on {split}", "tpo_jax.evaluate", "--model", model,
            "--data", steps.out / "data" / split, "--out", result, *demo.PART,
            "--tasks", ",".join(asked), "--evidence", ARMS[arm].evidence,
            *(("--task_text",) if arm.startswith("text") else ()), lane=lane,
        )  # fmt: skip
        return result

    def choose_rates(
        self, searched: Sequence[str], rates: Sequence[float], metrics: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The best rate of each arm by the mean of `metrics` on validation, seed 0.

        Those runs are the ones of seed 0 in the study itself.

        Args:
          rates: of which a tiny study tries the middle one.

        Returns: {arm: rate}, and {arm: {rate: mean}}.
        """
        tried = rates[1:2] if self.options.tiny else rates
        files = {}
        for arm in searched:
            for rate in tried:
                model = self.train(0, arm, rate=rate)
                files[arm, rate] = self.evaluate(0, arm, model, "validation")
        self.wait()
        found: dict[str, dict[str, float]] = {arm: {} for arm in searched}
        for (arm, rate), file in files.items():
            of_run = results.read_json(file)["metrics"]
            found[arm][f"{rate:g}"] = statistics.fmean(of_run[name] for name in metrics)
        best = {arm: float(max(means, key=means.__getitem__)) for arm, means in found.items()}
        return best, found

    def floors(self, seed: int, questions: bool = True) -> pathlib.Path:
        """What constants reach, and with `questions` a model that sees the middle frame alone."""
        steps, given = self.steps(seed), ()
        name = "floors" if questions else "floors_of_constants"
        if questions:
            arm = "middle_frame"
            workdir = steps.out / arm
            steps.beside(f"train {arm}", *self._training(steps, arm, workdir),
                         f"--config.seed={seed}", lane="floors")  # fmt: skip
            seen = self.evaluate(seed, arm, workdir / "model", lane="floors")
            given = ("--middle_frame", seen)
        data, result = steps.out / "data", steps.out / "eval" / f"{name}.json"
        steps.beside(
            name, "tpo_jax.evaluate", "--floors_from", data / "train", "--data", data / "test",
            "--out", result, *demo.PART, *given, lane="floors",
        )  # fmt: skip
        return result

    def record(
        self, files: Mapping[str, Mapping[int, pathlib.Path]], floors: Mapping[int, pathlib.Path],
        **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What the study found, once all evaluations are there.

        "arms" is {arm: {metric: [of each seed]}}, "floors" {metric: [of each seed]};
        "trained" {arm: [of each seed, by `trained`]}, "training_cpu_seconds" {arm: [of each seed]},
        "cpu_seconds" of all steps in OUT until now.
        """
        self.wait()
        arms: dict[str, dict[str, list[float]]] = {}
        seen: dict[str, list[dict[str, Any]]] = {}
        spent: dict[str, list[float]] = {}
        for arm, of_seeds in files.items():
            found = [results.read_json(of_seeds[seed])["metrics"] for seed in self.seeds]
            arms[arm] = {m: [f[m] for f in found] for m in found[0] if all(m in f for f in found)}
            if arm in ARMS:
                run = of_seeds[0].stem.removesuffix("_test")
                seen[arm] = [trained(self._steps[s].out / run) for s in self.seeds]
                spent[arm] = [self._steps[s].cpu_seconds[f"train {run}"] for s in self.seeds]
        lowest = [results.read_json(floors[seed])["floors"] for seed in self.seeds]
        return {
            "device": describe_device(), "versions": versions(), "tiny": self.options.tiny,
            "seeds": list(self.seeds), "share_of_steps": self.options.steps,
            "videos": self.scale.train, "test_videos": self.scale.test, "arms": arms,
            "floors": {m: [f[m] for f in lowest] for m in lowest[0]},
            "trained": seen, "training_cpu_seconds": spent,
            "cpu_seconds": sum(sum(s.cpu_seconds.values()) for s in self._steps.values()),
        } | more  # fmt: skip

    def wait(self) -> None:
        for steps in self._steps.values():
            steps.wait()

    def stop(self) -> None:
        """Of all seeds; see Steps.stop."""
        for steps in self._steps.values():
            steps.stop()


def run_name(arm: str, rate: float) -> str:
    return arm if rate == 1 else f"{arm}_rate{rate:g}"


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/task_preference"))
    made.add_argument(
        "--results", type=pathlib.Path,
        help=f"folder of json, plot and README.md; {RESULTS}, of a test OUT/results",
    )  # fmt: skip
    made.add_argument("--base", type=pathlib.Path, default=demo.BASE, help="model folder")
    made.add_argument("--seeds", type=int, default=3, help="of rendering, splits and training")
    made.add_argument("--videos", type=int, default=FULL.train, help="to train on, of a seed")
    made.add_argument("--steps", type=float, default=1.0, help="share of the steps of every arm")
    made.add_argument("--tiny", action="store_true", help="a few videos and steps, for tests")
    return made


def main(name: str, description: str, run: Callable[[Study], dict[str, Any]]) -> None:
    """Runs a study; writes RESULTS/<name>.json, its plot and the page of all studies."""
    flags = parser(description).parse_args()
    flags.results = flags.results or (flags.out / "results" if flags.tiny else RESULTS)
    options = Options(**vars(flags))
    try:
        options.check()
        study = Study(options)
        signal.signal(signal.SIGTERM, lambda *_: study.stop())
        record = run(study)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)
    command = f"python -m experiments.task_preference.{name} --seeds {options.seeds}"
    command += f" --videos {options.videos}" if options.videos != FULL.train else ""
    command += f" --steps {options.steps:g}" if options.steps != 1 else ""
    page.write(options.results, name, {"command": command} | record)
    print(options.results / "README.md")
