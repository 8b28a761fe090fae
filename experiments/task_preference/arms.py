"""Trains and evaluates the arms of configs/task_preference.py with the commands of the demo."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments import demo
from experiments.steps import StepFailed, Steps
from experiments.task_preference import page
from tpo_jax.evaluation import results
from tpo_jax.evaluation.summary import describe_device, versions

RESULTS = pathlib.Path("experiments/results/task_preference")
# Floors of tasks: the best constants of the training split, scored on the test split.
FLOORS = "floors"


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the command line: see `parser`.

    The runs in `out` belong to one choice of the base, the steps and tiny; see `check`.
    """

    out: pathlib.Path
    results: pathlib.Path
    base: pathlib.Path
    seeds: int
    steps: float
    tiny: bool

    def check(self) -> None:
        """Writes what decides the runs into `out`; ValueError if those there were others."""
        mine = {"base": str(self.base), "steps": self.steps, "tiny": self.tiny}
        file = self.out / "options.json"
        if not file.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(mine) + "\n")
        elif (theirs := json.loads(file.read_text())) != mine:
            raise ValueError(
                f"--out {self.out}: has runs of {theirs}, expected {mine}; use another"
            )


class Study:
    """The runs of one study, OUT/seed<n>/<arm>/<stage>; data and finished steps are shared."""

    def __init__(self, options: Options):
        self.options = options
        self.scale = demo.TINY if options.tiny else demo.FULL
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
            demo.make_data(steps, self.scale, seed)
            self._steps[seed] = steps
        return self._steps[seed]

    def floors(self, seed: int) -> pathlib.Path:
        """Of the tasks by constants, of questions by models that see nothing or one frame."""
        demo.measure_floors(self.steps(seed), self.scale, self.options.base, seed)
        return self.steps(seed).out / "eval" / "floors.json"

    def train(
        self, seed: int, arm: str, stages: tuple[str, ...] = (), *, rate: float = 1.0,
        start: pathlib.Path | None = None, data: str = "data",
    ) -> pathlib.Path:  # fmt: skip
        """Trains an arm stage by stage; returns the model folder of the last stage.

        Args:
          stages: of configs/task_preference.py; by default those of the demo, in a test its first.
          rate: multiplies all learning rates.
          start: model folder of the first stage; None for the base.
          data: folder beside the arms.
        """
        steps = self.steps(seed)
        name = self.name(arm, rate)
        runs = steps.out / name
        init = f",init={start or self.options.base}"
        for stage in stages or demo.STAGES[: 1 if self.options.tiny else None]:
            workdir = runs / (f"stage{stage}" if stage.isdigit() else stage)
            steps.run(
                f"train {name} {stage}", "tpo_jax.train",
                f"--config=configs/task_preference.py:arm={arm},stage={stage},runs={runs}"
                f",data={steps.out / data},rate={rate},steps={self.options.steps}"
                f"{init}{self.scale.config}",
                f"--workdir={workdir}", f"--config.seed={seed}",
            )  # fmt: skip
            init = ""
        return workdir / "model"

    def evaluate(self, seed: int, name: str, model: pathlib.Path, split: str = "test",
                 *more: object) -> pathlib.Path:  # fmt: skip
        """Evaluates beside the next training; returns the file of the metrics."""
        steps = self.steps(seed)
        result = steps.out / "eval" / f"{name}_{split}.json"
        steps.beside(
            f"evaluate {name} on {split}", "tpo_jax.evaluate", "--model", model,
            "--data", steps.out / "data" / split, "--out", result, *demo.PART, *more,
        )  # fmt: skip
        return result

    def name(self, arm: str, rate: float = 1.0) -> str:
        return arm if rate == 1 else f"{arm}_rate{rate:g}"

    def seconds(self, arm: str) -> dict[int, float]:
        """Processor seconds that training of an arm took, by seed."""
        return {
            seed: sum(s for step, s in self.steps(seed).cpu_seconds.items()
                      if step.split()[:2] == ["train", arm])
            for seed in self.seeds
        }  # fmt: skip

    def wait(self) -> None:
        for steps in self._steps.values():
            steps.wait()

    def record(
        self, files: Mapping[str, Mapping[int, pathlib.Path]], floors: Mapping[int, pathlib.Path],
        **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What the study found, once all evaluations are there: {arm: {metric: [of each seed]}}."""
        self.wait()
        arms: dict[str, dict[str, list[float]]] = {}
        for arm, of_seeds in files.items():
            found = [results.read_json(of_seeds[seed])["metrics"] for seed in self.seeds]
            arms[arm] = {m: [f[m] for f in found] for m in found[0] if all(m in f for f in found)}
        lowest = (
            [results.read_json(floors[seed])["floors"] for seed in self.seeds] if floors else []
        )
        return {
            "device": describe_device(), "versions": versions(), "tiny": self.options.tiny,
            "seeds": list(self.seeds), "share_of_steps": self.options.steps,
            "videos": self.scale.train, "test_videos": self.scale.test, "arms": arms,
            "floors": {m: [f[m] for f in lowest] for m in (lowest[0] if lowest else {})},
        } | more  # fmt: skip


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/task_preference"))
    made.add_argument(
        "--results", type=pathlib.Path,
        help=f"folder of json, plot and README.md; {RESULTS}, of a test OUT/results",
    )  # fmt: skip
    made.add_argument("--base", type=pathlib.Path, default=demo.BASE, help="model folder")
    made.add_argument("--seeds", type=int, default=3, help="of rendering, splits and training")
    made.add_argument("--steps", type=float, default=1.0, help="share of the steps of every stage")
    made.add_argument("--tiny", action="store_true", help="a few videos and steps, for tests")
    return made


def main(name: str, description: str, run: Callable[[Study], dict[str, Any]]) -> None:
    """Runs a study; writes RESULTS/<name>.json, its plot and the page of all studies."""
    flags = parser(description).parse_args()
    flags.results = flags.results or (flags.out / "results" if flags.tiny else RESULTS)
    options = Options(**vars(flags))
    try:
        options.check()
        record = run(Study(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)
    command = f"python -m experiments.task_preference.{name} --seeds {options.seeds}"
    command += f" --steps {options.steps:g}" if options.steps != 1 else ""
    page.write(options.results, name, {"command": command} | record)
    print(options.results / "README.md")
