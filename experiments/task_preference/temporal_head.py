"""What does a head that reads the video add to two layers on the language model's state?

    python -m experiments.task_preference.temporal_head --out runs/task_preference --seeds 3

Temporal questions beside conversation with three heads: `cg_detr` with the published losses,
`temporal_mlp`, which sees the slot state alone, and the demo's light `temporal`. Data and the base
are those of the central study; the same command goes on where it stopped.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments.task_preference import arms
from experiments.task_preference.arms import Study

ARMS = ("temporal_mlp", "cg_detr", "temporal")


def run(study: Study) -> dict[str, Any]:
    files: dict[str, dict[int, pathlib.Path]] = {arm: {} for arm in ARMS}
    floors = {}
    for seed in study.seeds:
        floors[seed] = study.floors(seed)
        for arm in ARMS:
            files[arm][seed] = study.evaluate(seed, arm, study.train(seed, arm))
    return study.record(files, floors)


if __name__ == "__main__":
    arms.main("temporal_head", __doc__, run)
