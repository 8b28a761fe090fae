"""Is a mask head better taught by its masks, or by the box of the object on the first frame?

    python -m experiments.task_preference.mask_loss --out runs/task_preference --seeds 3

A SAM 2 of the demo's size learns to follow boxes that are drawn around what is masked in the videos
of seed 0. It is then frozen and the same for all seeds, in the place of the published one that
comes trained. The language model and the adapter, which turns the slot state into SAM 2's prompt,
learn from one of three objectives: `first_frame_box`, all that is published: the distance to the
prompt of the object's box on the first frame, and to that box from what a second network reads out
of the slot state (of an object that is absent there the box is -1, and no prompt is taught);
`sam2`, the losses of the masks in all frames; or `sam2_all`, both, the box that of the frame that
shows most of the object, which is what the configs with published numbers have. The same command
goes on where it stopped.
"""

from __future__ import annotations

import pathlib
from typing import Any

from experiments.task_preference import arms
from experiments.task_preference.arms import Study
from tpo_jax.evaluation import results

TRACKER = ("tracker_stills", "tracker_pairs", "tracker")
ARMS = ("first_frame_box", "sam2", "sam2_all")
FIRST, DRAWN = "first_frame", "drawn_boxes"


def run(study: Study) -> dict[str, Any]:
    files: dict[str, dict[int, pathlib.Path]] = {arm: {} for arm in ARMS}
    floors = {}
    _relabel(study, 0, DRAWN)
    tracker = None
    for stage in TRACKER:
        tracker = study.train(0, stage, init=tracker, data=DRAWN)
    followed = study.evaluate(0, "tracker", tracker)
    for seed in study.seeds:
        floors[seed] = study.floors(seed, questions=False)
        _relabel(study, seed, FIRST)
        for arm in ARMS:
            data = FIRST if arm == "first_frame_box" else "data"
            model = study.train(seed, arm, init=tracker, data=data)
            files[arm][seed] = study.evaluate(seed, arm, model)
    record = study.record(files, floors)
    return record | {"tracker": results.read_json(followed)["metrics"]}


def _relabel(study: Study, seed: int, labels: str) -> None:
    """Makes OUT/seed<n>/<labels>/train of the training videos of a seed."""
    steps = study.steps(seed)
    steps.run(
        f"label {labels}", "experiments.task_preference.relabelled", labels,
        "--data", steps.out / "data" / "train", "--out", steps.out / labels / "train",
    )  # fmt: skip


if __name__ == "__main__":
    arms.main("mask_loss", __doc__, run)
