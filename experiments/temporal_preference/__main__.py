"""Studies of Temporal Preference Optimization on long videos, from the shipped base model.

    python -m experiments.temporal_preference objectives    base, SFT on the chosen answers, DPO
    python -m experiments.temporal_preference mix           localized : comprehensive pairs
    python -m experiments.temporal_preference size          a fifth, half and all of the pairs
    python -m experiments.temporal_preference frames        more frames in the test than trained on
    python -m experiments.temporal_preference needles       depth of the evidence by length
    python -m experiments.temporal_preference all

Studies share data, pairs and models in --out. Run again after an interruption, a study goes on
where it stopped. README.md, a plot and the figures of each study, and steps.jsonl with the time of
every command, are written to --results.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable

from experiments.steps import StepFailed, Steps
from experiments.temporal_preference import report
from experiments.temporal_preference.runs import FULL, TINY, Runs, pairs_trained_on
from experiments.temporal_preference.studies import MODELS, STUDIES

RESULTS = pathlib.Path("experiments/results/temporal_preference")


def run(runs: Runs, name: str, seeds: Iterable[int]) -> dict:
    """All commands of one study; returns its figures."""
    study, seeds = STUDIES[name], tuple(seeds)
    runs.prepare()
    search = runs.choose_rates()
    conditions = study.conditions(runs)
    files: dict[tuple[str, str], dict[int, pathlib.Path]] = {}
    pairs: dict[str, list[int]] = {}
    for seed in seeds:
        for label in study.models:
            is_base = MODELS[label].objective == "base"
            model = runs.train(label.replace(" ", "_"), MODELS[label], seed)
            if not is_base:
                pairs.setdefault(label, []).append(pairs_trained_on(model))
            for condition, evaluation in conditions.items():
                # The base is the same with every seed: its step is done once.
                file = f"{'' if is_base else f'seed{seed}_'}{label}_{condition}".replace(" ", "_")
                result = runs.evaluate(file, model, evaluation.data, *evaluation.arguments)
                files.setdefault((label, condition), {})[seed] = result
    runs.steps.wait()
    return report.figures(name, files, runs.scale, pairs, search)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.temporal_preference", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"], metavar="STUDY")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/temporal_preference")
    )
    parser.add_argument("--results", type=pathlib.Path, help=f"{RESULTS}; with --tiny OUT/results")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a few videos and steps, for tests")
    flags = parser.parse_args()
    names = list(STUDIES) if "all" in flags.studies else list(dict.fromkeys(flags.studies))
    runs = Runs(Steps(flags.out), TINY if flags.tiny else FULL)
    folder = flags.results or (flags.out / "results" if flags.tiny else RESULTS)
    runs.steps.stop_on_sigterm()
    try:
        for name in names:
            page = report.write(folder, run(runs, name, range(flags.seeds)), runs.steps.journal)
            print(f"\n{page}")
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
