"""What does a head that reads the video add to two layers on the language model's state?

    python -m experiments.task_preference.temporal_head --out runs/task_preference --seeds 3

Temporal questions beside conversation with three heads: `cg_detr` with the published losses,
`temporal_mlp`, which sees the slot state alone, and the demo's light `temporal`. Each chooses its
learning rates among the same three, by the validation split of seed 0. Data and the base are those
of the central study; the same command goes on where it stopped.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments.task_preference import arms
from experiments.task_preference.arms import Study

ARMS = ("temporal_mlp", "cg_detr", "temporal")
RATES = (0.5, 1.0, 2.0)
CHOSEN_BY = ("temporal/miou",)


def run(study: Study) -> dict[str, Any]:
    rates, search = study.choose_rates(ARMS, RATES, CHOSEN_BY)
    files: dict[str, dict[int, pathlib.Path]] = {arm: {} for arm in ARMS}
    floors = {}
    for seed in study.seeds:
        floors[seed] = study.floors(seed)
        for arm in ARMS:
            model = study.train(seed, arm, rate=rates[arm])
            files[arm][seed] = study.evaluate(seed, arm, model)
    return study.record(files, floors, rates=rates, search=search)


if __name__ == "__main__":
    arms.main("temporal_head", __doc__, run)
