"""Do task heads teach more than the same data in words, or than conversation alone?

    python -m experiments.task_preference.central --out runs/task_preference --seeds 3

Eight arms of configs/task_preference.py from the shipped base: conversation alone, the targets as
text, asked as often as heads or reading as many positions, task heads, and heads without
conversation for one task or all. Texts and heads each choose their learning rates among the same
three, by the validation split of seed 0; the other arms take those of heads. The same command goes
on where it stopped.
"""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from experiments.task_preference import arms
from experiments.task_preference.arms import Study
from experiments.task_preference.ceilings import words_at_best
from tpo_jax.data.records import PreparedDataset
from tpo_jax.interop.folder import load_config

# Half was the poorest of 0.5, 1 and 2 for both in a run that was not finished: it is left out.
RATES = (1.0, 2.0, 4.0)
ARMS = ("conversation", "text", "text_half", "heads", "TRM", "T", "R", "M")
SEARCHED = ("text", "text_half", "heads")
# The rates are chosen by the mean of these.
CHOSEN_BY = ("qa/accuracy", "temporal/miou", "region/miou", "mask/j&f", "tracking/auc")


def run(study: Study) -> dict[str, Any]:
    rates, search = study.choose_rates(SEARCHED, RATES, CHOSEN_BY)
    files: dict[str, dict[int, pathlib.Path]] = {arm: {} for arm in ("base", *ARMS)}
    floors = {}
    for seed in study.seeds:
        floors[seed] = study.floors(seed)
        base = study.options.base
        files["base"][seed] = study.evaluate(seed, "conversation", base, name="base")
        for arm in ARMS:
            model = study.train(seed, arm, rate=rates.get(arm, rates["heads"]))
            files[arm][seed] = study.evaluate(seed, arm, model)
    return study.record(files, floors, rates=rates, search=search, words_at_best=ceilings(study))


def ceilings(study: Study) -> dict[str, list[float]]:
    """{metric: [of each seed]}: the labels of the test videos in the words of `text`, read back."""
    frames = load_config(study.options.base).vision.max_frames
    folders = [study.steps(seed).out / "data" / "test" for seed in study.seeds]
    found = [words_at_best(PreparedDataset(folder), frames) for folder in folders]
    shared = [metric for metric in found[0] if all(metric in seed for seed in found)]
    return {metric: [statistics.fmean(seed[metric]) for seed in found] for metric in shared}


if __name__ == "__main__":
    arms.main("central", __doc__, run)
