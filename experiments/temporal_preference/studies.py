"""What each study trains, what it asks of the models, and what was published about it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments.temporal_preference.runs import HIDDEN_QUESTIONS, Model, Runs

MODELS = {
    "base": Model("base"),
    "sft": Model("sft"),
    "dpo": Model(),
    "localized": Model(share=0.5, manipulation="localized"),
    "comprehensive": Model(share=0.5, manipulation="comprehensive"),
    "fifth": Model(share=0.2),
    "half": Model(share=0.5),
    "few frames": Model(few=True),
}
QA, PREFERENCE, HIDDEN = "qa/accuracy", "preference/accuracy", "preference/accuracy_blind"
TEST, BLIND = "test", "video hidden"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One call of `evaluate`: the prepared folder, and its other arguments."""

    data: pathlib.Path
    arguments: tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """A figure: of a model (key of MODELS), under a condition (an Evaluation's name)."""

    model: str
    condition: str = TEST
    metric: str = QA


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something published that a study can agree with: `more` has the higher figure.

    Attributes:
      published: the figures, as printed in arXiv 2501.13919.
    """

    text: str
    published: str
    more: Callable[[Any], Place]
    less: Callable[[Any], Place]


@dataclasses.dataclass(frozen=True)
class Study:
    """Models that are compared, the first one with all others.

    Attributes:
      conditions: of the runs -> {name: evaluation}; the same for every model.
    """

    title: str
    models: tuple[str, ...]
    conditions: Callable[[Runs], Mapping[str, Evaluation]]
    claims: tuple[Claim, ...]


def on_test(runs: Runs) -> dict[str, Evaluation]:
    """Questions and preferences, and the questions without the video."""
    tasks = ("--tasks", "qa,preference", "--pairs", runs.test_pairs)
    return {
        TEST: Evaluation(runs.data("test"), tasks),
        BLIND: Evaluation(runs.data("test"), HIDDEN_QUESTIONS),
    }


def on_frames(runs: Runs) -> dict[str, Evaluation]:
    """Questions about few, twice as many, ... and all frames; hidden, the number is the same."""
    few, most = runs.scale.few_frames, runs.scale.frames
    counts = [few * 2**i for i in range(16) if few * 2**i < most]
    evaluations = {
        f"{count} frames": Evaluation(runs.data("test"), ("--tasks", "qa", "--frames", count))
        for count in counts
    }
    return evaluations | on_test(runs)


def on_needles(runs: Runs) -> dict[str, Evaluation]:
    """Questions about needles in videos of every length, and the same with the video hidden."""
    data = {f"needles in {n} s": runs.needles(n) for n in runs.scale.lengths}
    seen = {name: Evaluation(folder, ("--tasks", "qa")) for name, folder in data.items()}
    hidden = {
        hidden_condition(name): Evaluation(folder, HIDDEN_QUESTIONS)
        for name, folder in data.items()
    }
    return seen | hidden


def hidden_condition(condition: str) -> str:
    """The condition that has the questions of this one with the video hidden.

    "needles in 64 s" -> "needles hidden in 64 s". All numbers of frames share one: of a hidden
    video `evaluate` takes a single frame, whatever `--frames` says.
    """
    what, within, length = condition.partition(" in ")
    return f"{what} hidden in {length}" if within else BLIND


def _model(name: str, metric: str = QA) -> Callable[[Any], Place]:
    return lambda scale: Place(name, TEST, metric)


def _frames(name: str, few: bool) -> Callable[[Any], Place]:
    return lambda scale: Place(name, f"{scale.few_frames} frames" if few else TEST)


def _longest(name: str) -> Callable[[Any], Place]:
    return lambda scale: Place(name, f"needles in {scale.lengths[-1]} s")


STUDIES = {
    "objectives": Study(
        "Base, SFT on the chosen answers, DPO on the same pairs",
        ("base", "sft", "dpo"),
        on_test,
        (
            Claim(
                "DPO is better than the base",
                "LongVideoBench 54.2 against 51.3, MLVU 61.7 against 58.8, Video-MME 55.1 against "
                "52.6",
                _model("dpo"), _model("base"),
            ),
            Claim(
                "DPO is better than SFT on the preferred answers",
                "LongVideoBench 54.2 against 52.7, MLVU 61.7 against 58.9, Video-MME 55.1 against "
                "53.9",
                _model("dpo"), _model("sft"),
            ),
            Claim(
                "SFT on the preferred answers is better than the base",
                "LongVideoBench 52.7 against 51.3, MLVU 58.9 against 58.8, Video-MME 53.9 against "
                "52.6",
                _model("sft"), _model("base"),
            ),
        ),
    ),
    "mix": Study(
        "Localized : comprehensive pairs, 10:0 (localized), 5:5 (half) and 0:10 (comprehensive)",
        ("base", "localized", "half", "comprehensive"),
        on_test,
        (
            Claim(
                "5:5 is better than localized pairs alone",
                "LongVideoBench 54.2 against 53.5, MLVU 61.7 against 58.7, Video-MME 55.1 against "
                "54.0",
                _model("half"), _model("localized"),
            ),
            Claim(
                "5:5 is better than comprehensive pairs alone",
                "LongVideoBench 54.2 against 53.4, MLVU 61.7 against 58.5, Video-MME 55.1 against "
                "53.8",
                _model("half"), _model("comprehensive"),
            ),
        ),
    ),
    "size": Study(
        "A fifth, half and all of the pairs, as 2k, 5k and 10k",
        ("base", "fifth", "half", "dpo"),
        on_test,
        (
            Claim(
                "half of the pairs are better than a fifth",
                "LongVideoBench 53.7 against 52.5, MLVU 59.5 against 57.8, Video-MME 53.6 against "
                "52.8",
                _model("half"), _model("fifth"),
            ),
            Claim(
                "all pairs are better than half",
                "LongVideoBench 54.2 against 53.7, MLVU 61.7 against 59.5, Video-MME 55.1 against "
                "53.6",
                _model("dpo"), _model("half"),
            ),
            Claim(
                "a fifth of the pairs is better than the base",
                "LongVideoBench 52.5 against 51.3, MLVU 57.8 against 58.8 (worse), Video-MME 52.8 "
                "against 52.6",
                _model("fifth"), _model("base"),
            ),
        ),
    ),
    "frames": Study(
        "More frames in the test than in the training on preferences",
        ("base", "few frames", "dpo"),
        on_frames,
        (
            Claim(
                "trained on few frames, the model is better with all of them than with few",
                "MLVU, a figure without numbers: trained at 32, still rising at more than 64",
                _frames("few frames", False), _frames("few frames", True),
            ),
            Claim(
                "with all frames it is better than the base with all frames",
                "MLVU, the same figure: LongVA falls above 64 frames",
                _frames("few frames", False), _frames("base", False),
            ),
        ),
    ),
    "needles": Study(
        "A needle in a haystack: depth of the evidence by length of the video",
        ("base", "sft", "dpo"),
        on_needles,
        (
            Claim(
                "DPO finds more needles than the base in the longest videos",
                "a heat map without numbers",
                _longest("dpo"), _longest("base"),
            ),
        ),
    ),
}  # fmt: skip
