"""The commands behind the studies: data, pairs, training and evaluation, each done once.

Everything is a step of one `Steps`, so studies share what they have in common and an interrupted
one goes on where it stopped. All seeds read the same videos and draw from the same pools of pairs;
a seed decides which pairs are drawn and in which order they are trained on. Learning rates are
chosen on the validation split.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.steps import Steps
from tpo_jax.evaluation import results

BASE = pathlib.Path("tpo_jax/assets/tiny_base")
WORLD_SEED = 4000  # far from those of the base and of the demo
CONFIG = "configs/temporal_preference.py"
MIX = 0.5  # share of localized manipulations in the pools
SEARCHED = ("sft", "dpo")
CHOSEN_BY = "qa/accuracy"
HIDDEN_QUESTIONS = ("--tasks", "qa", "--evidence", "blind")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
      train, validation, test: videos of `seconds` with a mean of `density` events in 10 s, of
        which a model sees 32 frames: most of a video says nothing about a question.
      rates: that are tried for each objective.
      pool: pairs that are generated; pairs: of one training run, drawn from them; test_pairs: to
        score.
      needles: a cell of the map has the questions about so many videos.
    """

    train: int = 800
    validation: int = 160
    test: int = 240
    seconds: int = 32
    density: float = 1.0
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    pool: int = 2400
    pairs: int = 2000
    test_pairs: int = 200
    frames: int = 32
    few_frames: int = 8
    needles: int = 16
    lengths: tuple[int, ...] = (16, 32, 64)
    # Of `preferences generate`: answers are drawn once, and rules tell right ones from wrong ones.
    judge: str = "rules"
    tiny: bool = False


FULL = Scale()
# Seconds instead of minutes, for the tests; its figures mean nothing.
TINY = Scale(
    train=6, validation=3, test=3, seconds=16, density=1.5, rates=(1e-4, 1e-3), pool=12, pairs=10,
    test_pairs=4, frames=8, few_frames=4, needles=1, lengths=(8, 16), judge="none", tiny=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """One trained model, or with objective "base" the one that all start from.

    Attributes:
      objective: argument of the config.
      share: of the pairs of one run.
      manipulation: "localized" or "comprehensive": pairs of this kind alone; "" for both, of which
        the pool has about as many.
      few: whether it is trained on clips of few frames.
    """

    objective: str = "dpo"
    share: float = 1.0
    manipulation: str = ""
    few: bool = False


@dataclasses.dataclass(frozen=True)
class Searched:
    """Accuracy of a tried rate, and the same with the video hidden."""

    accuracy: float
    hidden: float


class Runs:
    """What one scale and folder need; every method returns where its result is."""

    def __init__(self, steps: Steps, scale: Scale):
        self.steps, self.scale, self.out = steps, scale, steps.out
        self.rates: dict[str, float] = {}

    def prepare(self) -> None:
        """Renders and prepares the videos of every split, and makes pairs to test with."""
        scale = self.scale
        splits = {"train": scale.train, "test": scale.test, "validation": scale.validation}
        self.steps.run(
            "render", "tpo_jax.data.moving_shapes", "--out", self.out / "world",
            "--seed", WORLD_SEED, "--videos", sum(splits.values()),
            "--splits", ",".join(f"{split}:{count}" for split, count in splits.items()),
            "--seconds", scale.seconds, "--density", scale.density, "--processes", 2,
        )  # fmt: skip
        for split in splits:
            self.steps.run(
                f"prepare {split}", "tpo_jax.prepare", "run", "--data", self.out / "world" / split,
                "--out", self.data(split), "--processes", 2,
            )  # fmt: skip
        self._generate("test", self.test_pairs.parent, scale.test_pairs, scale.frames)

    def data(self, split: str) -> pathlib.Path:
        return self.out / "data" / split

    @property
    def test_pairs(self) -> pathlib.Path:
        return self.out / "pairs_test" / "pairs.jsonl"

    def choose_rates(self) -> dict[str, dict[float, Searched]]:
        """{objective: {rate: questions about validation videos}}, of seed 0.

        From now on, `train` takes the best of an objective, whatever its pairs.
        """
        files = {}
        for objective in SEARCHED:
            for rate in self.scale.rates:
                name = f"validation_{objective}_rate{rate:g}"
                model = self._train(objective, Model(objective), 0, rate)
                data = self.data("validation")
                files[objective, rate] = (
                    self.evaluate(name, model, data, "--tasks", "qa"),
                    self.evaluate(f"{name}_hidden", model, data, *HIDDEN_QUESTIONS),
                )
        self.steps.wait()
        found: dict[str, dict[float, Searched]] = {objective: {} for objective in SEARCHED}
        for (objective, rate), both in files.items():
            metrics = (results.read_json(file)["metrics"][CHOSEN_BY] for file in both)
            found[objective][rate] = Searched(*metrics)
        self.rates = {objective: best(of) for objective, of in found.items()}
        return found

    def train(self, name: str, model: Model, seed: int) -> pathlib.Path:
        """The model folder; the base's without training. After `choose_rates`."""
        if model.objective == "base":
            return BASE
        return self._train(name, model, seed, self.rates[model.objective])

    def _train(self, name: str, model: Model, seed: int, rate: float) -> pathlib.Path:
        scale = self.scale
        frames = scale.few_frames if model.few else scale.frames
        pairs = self._pairs(frames)
        wanted = round(model.share * scale.pairs)
        manifest, count = draw_pairs(pairs / "pairs.jsonl", wanted, seed, model.manipulation)
        argument = (
            f"objective={model.objective},data={self.data('train')},pairs={pairs},"
            f"manifest={manifest},count={count},frames={frames},rate={rate:g},tiny={scale.tiny}"
        )
        workdir = self.out / f"seed{seed}" / f"{name}_rate{rate:g}"
        self.steps.run(
            f"seed{seed} train {workdir.name}", "tpo_jax.train", f"--config={CONFIG}:{argument}",
            f"--workdir={workdir}", f"--config.seed={seed}",
        )  # fmt: skip
        return workdir / "model"

    def _pairs(self, frames: int) -> pathlib.Path:
        """Folder of the pool of pairs that the base generated and scored."""
        out = self.out / f"pairs_mix{MIX:g}_frames{frames}"
        self._generate("train", out, self.scale.pool, frames)
        self.steps.run(
            f"score {out.name}", "tpo_jax.preferences", "score", "--model", BASE,
            "--data", self.data("train"), "--pairs", out / "pairs.jsonl",
            "--out", out / "reference.npz", "--frames", frames,
        )  # fmt: skip
        return out

    def _generate(self, split: str, out: pathlib.Path, pairs: int, frames: int) -> None:
        self.steps.run(
            f"generate {out.name}", "tpo_jax.preferences", "generate",
            "--model", BASE, "--data", self.data(split), "--out", out, "--pairs", pairs,
            "--seed", 0, "--mix", MIX, "--frames", frames, "--samples", 1,
            "--subset", 0.125, "--judge", self.scale.judge,
        )  # fmt: skip

    def evaluate(
        self, name: str, model: pathlib.Path, data: pathlib.Path, *more: object
    ) -> pathlib.Path:
        """The file that `evaluate` writes; the command runs beside those that follow."""
        result = self.out / "eval" / f"{name}.json"
        self.steps.beside(
            f"evaluate {name}", "tpo_jax.evaluate", "--model", model, "--data", data,
            "--out", result, *more,
        )  # fmt: skip
        return result

    def needles(self, seconds: int) -> pathlib.Path:
        """The prepared folder of needles in videos of one length."""
        raw, prepared = (self.out / kind / str(seconds) for kind in ("needles", "needles_data"))
        self.steps.run(
            f"needles {seconds}", "experiments.temporal_preference.needles", "--out", raw,
            "--seconds", seconds, "--needles", self.scale.needles,
        )  # fmt: skip
        self.steps.run(
            f"prepare needles {seconds}", "tpo_jax.prepare", "run", "--media", raw,
            "--format", "native", "--annotations", raw / "needles.jsonl", "--out", prepared,
            "--processes", 2,
        )  # fmt: skip
        return prepared


def best(found: Mapping[float, Searched]) -> float:
    """The rate with the highest accuracy; of equal ones the lowest."""
    return max(sorted(found), key=lambda rate: found[rate].accuracy)


def pairs_trained_on(model: pathlib.Path) -> int:
    """Of a model folder that `train` wrote: lines of its manifest."""
    config = json.loads((model.parent / "config.json").read_text())
    (source,) = config["data"]["train"]
    return len(pathlib.Path(source["pairs"]).read_text().splitlines())


def draw_pairs(
    manifest: pathlib.Path, wanted: int, seed: int, manipulation: str = ""
) -> tuple[str, int]:
    """Writes `wanted` pairs, of one kind of manipulation if it is named, drawn with `seed`, beside
    a manifest; returns the file's name and its pairs.

    Fewer pairs of a seed are the first of more. The manifest may hold fewer than are wanted.
    """
    lines = [
        line for line in manifest.read_text().splitlines(keepends=True)
        if manipulation in ("", json.loads(line)["targets"]["manipulation"])
    ]  # fmt: skip
    drawn = np.random.default_rng(seed).permutation(len(lines))[:wanted]
    kind = f"{manipulation}_" if manipulation else ""
    part = manifest.with_name(f"seed{seed}_{kind}{len(drawn)}.jsonl")
    temporary = part.with_name(part.name + ".tmp")
    temporary.write_text("".join(lines[i] for i in drawn))
    temporary.replace(part)
    return part.name, len(drawn)
