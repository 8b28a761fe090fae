"""The stages of the demo, each a run of its own that starts from the one before.

    python -m tpo_jax.train --config=configs/demo.py:stage=1 --workdir=runs/demo/stage1
    python -m tpo_jax.train --config=configs/demo.py:stage=2 --workdir=runs/demo/stage2
    python -m tpo_jax.train --config=configs/demo.py:stage=3 --workdir=runs/demo/stage3
    python -m tpo_jax.train --config=configs/demo.py:stage=dpo --workdir=runs/demo/dpo

  1    task assignment: the language model learns which task token answers a question
  2    heads and tokens, with the language model; the vision tower and the connector are frozen
  3    joint co-training of all of it with conversation
  dpo  temporal preferences on pairs that the model of stage 3 generated and scored
  floor  the base on the conversations alone, each about the middle frame of its video; with
         --config.data.evidence=blind it sees nothing at all

`runs` is the folder that holds data/{train,validation}, the stages and the pairs; `init` replaces
the model folder a stage starts from, `mask_size` goes with another than the shipped one (half its
image size); `tiny` is a few steps on small shapes, for tests.
"""

import importlib.resources
from collections.abc import Callable

from ml_collections import ConfigDict

from tpo_jax.training.config import (
    ConfigError,
    bucket_config,
    default_config,
    parse_arg,
    source_config,
)

BASE = str(importlib.resources.files("tpo_jax") / "assets" / "tiny_base")
# Kinds of question that have options.
CHOICES = [
    "action", "attribute", "before_after", "counting", "direction", "existence", "moment", "order",
    "image_attribute", "image_counting", "image_existence", "image_position",
]  # fmt: skip
HEADS = ["region", "temporal", "mask"]
# Not `action`: it asks for a list of labels in words, and no metric is of it; the segments are
# prepared for localization.
TASKS = {"conversation": 1.5, "temporal": 1.5, "region": 4.0, "mask": 1.0, "tracking": 1.0}
HEAD_LOSSES = {
    "region/l1": 5.0,
    "region/giou": 2.0,
    "region/cells": 2.0,
    "temporal/foreground": 1.0,
    "temporal/l1": 5.0,
    "temporal/giou": 1.0,
    "temporal/saliency": 1.0,
    "mask/focal": 20.0,
    "mask/dice": 2.0,
    "mask/cells": 1.0,
    "mask/presence": 1.0,
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage="1", runs="runs/demo", init="", mask_size=32, tiny=False)
    stages = {"1": _stage1, "2": _stage2, "3": _stage3, "dpo": _dpo, "floor": _floor}
    if arg.stage not in stages:
        raise ConfigError(f"config argument stage={arg.stage}: expected one of {', '.join(stages)}")
    config = default_config()
    # Sizes come from the folder in init_from: every stage is the same model with more trained.
    config.model.update(preset="", heads=HEADS)
    config.data.train = [source_config(f"{arg.runs}/data/train", tasks=TASKS)]
    config.data.validation = [source_config(f"{arg.runs}/data/validation", tasks=TASKS)]
    config.buckets = _buckets(arg.mask_size, arg.tiny)
    # Most answer tokens of a head call are certain, so the mean over tokens is small beside the
    # losses of the heads, which would change what the language model says.
    config.losses = {"language": 8.0, **HEAD_LOSSES}
    config.optimizer.update(name="muon", warmup=0.05, min_lr_ratio=0.05)
    config.checkpoint.update({"every": 200, "keep": 1})
    config.log_every = 10
    # Every bucket would compile a second program; with --config.eval_every=50 best_model/ has the
    # weights of the lowest validation loss.
    config.eval_every = 0
    stages[arg.stage](config, arg.runs)
    if arg.init:
        config.init_from = arg.init
    if arg.tiny:
        config.steps, config.log_every, config.eval_batches = 4, 1, 1
        config.eval_every = min(config.eval_every, 2)
        config.data.validation[0]["kinds"] = []  # a few videos lack some
    return config


def sweep(add: Callable[..., None]) -> None:
    """Is it the seed? python -m experiments.sweep --config=configs/demo.py:stage=2 --out=..."""
    for seed in range(3):
        add(seed=seed)


def _buckets(mask_size: int, tiny: bool) -> dict:
    """Short questions and head calls, the long rest (listed options, captions), and images."""
    video = {
        "media": "video",
        "batch_size": 4 if tiny else 8,
        "frames": 8 if tiny else 32,
        "windows": 4,
        "mask_size": mask_size,
    }
    slots = {"region": 12, "temporal": 4, "mask": 4, "box": 2}
    short = {"branches": 8 if tiny else 24, "branch_tokens": 30, "answers": 16, "slots": slots}
    long = {"branches": 4 if tiny else 12, "branch_tokens": 64, "answers": 48}
    image = video | {
        "media": "image", "batch_size": 4 if tiny else 16, "frames": 1, "branches": 4,
        "branch_tokens": 64, "answers": 48, "slots": {"region": 3},
    }  # fmt: skip
    return {
        "video": bucket_config(**video, **short, weight=6),
        "video_long": bucket_config(**video, **long),
        "image": bucket_config(**image),
    }


def _stage1(config: ConfigDict, runs: str) -> None:
    """Language model, embeddings and task tokens; head losses are only reported."""
    del runs
    config.init_from = BASE
    config.init_missing = ["task_tokens/", "box_encoder/", "heads/"]
    config.steps = 40
    config.losses.update(dict.fromkeys(HEAD_LOSSES, 0.0))
    del config.buckets["image"]  # the same task tokens as in videos
    config.trainable = [["task_tokens/|box_encoder/", 1e-2], ["language/", 4e-3]]


def _stage2(config: ConfigDict, runs: str) -> None:
    """Heads and tokens, and the language model, which has to say at a slot what is meant.

    A row asks many regions: the more of them a step, the sooner the head finds them. All kinds of
    questions stay in the mixture, because what is not asked is forgotten.
    """
    config.init_from = f"{runs}/stage1/model"
    config.steps = 150
    del config.buckets["image"]  # of which stage 3 learns enough
    config.trainable = [["heads/|task_tokens/|box_encoder/", 1e-2], ["language/", 2e-3]]


def _stage3(config: ConfigDict, runs: str) -> None:
    """Everything with more conversation; what the language model sees moves least."""
    config.init_from = f"{runs}/stage2/model"
    config.steps = 130
    config.losses.language = 12.0
    config.buckets.video.weight, config.buckets.video_long.weight = 8, 2
    config.trainable = [
        ["heads/|task_tokens/|box_encoder/", 4e-3],
        ["language/", 1e-3],
        ["connector/|vision/", 2e-4],
    ]


def _floor(config: ConfigDict, runs: str) -> None:
    """The base on the same conversations about the middle frame; data.evidence=blind hides that.

    A floor that has not learnt all it can flatters the model above it: how its answers to questions
    with options come along on validation is measured, and the floor is best_model.
    """
    del runs
    config.init_from = BASE
    config.model.heads = []
    config.losses = {"language": 1.0}
    config.steps = 100
    config.eval_every, config.log_every = 25, 5
    for source in (*config.data.train, *config.data.validation):
        source["tasks"] = {"conversation": 1.0}
    config.data.validation[0]["kinds"] = CHOICES
    del config.buckets["video"]  # questions are asked with their options
    for bucket in config.buckets.values():
        bucket.slots, bucket.frames = {}, 1
    config.trainable = [["language/", 5e-4]]


def _dpo(config: ConfigDict, runs: str) -> None:
    """DPO + SFT on right against manipulated evidence."""
    config.init_from = f"{runs}/stage3/model"
    config.objective = "preference"
    config.preference.update(loss="sigmoid", beta=0.3, sft=0.5)
    config.losses = {"language": 1.0}  # of the other objective; not read
    config.steps = 100
    config.optimizer.name = "adamw"
    config.data.train = [
        source_config(
            f"{runs}/data/train", tasks={"preference": 1.0}, pairs=f"{runs}/pairs/train/pairs.jsonl"
        )
    ]
    config.data.references = [f"{runs}/pairs/train/reference.npz"]
    frames, size = config.buckets.video.frames, config.buckets.video.batch_size
    config.buckets = {
        "pairs": bucket_config(
            media="video", batch_size=size, frames=frames, question=64, branches=2,
            branch_tokens=64, answers=48, windows=4, mask_size=config.buckets.video.mask_size,
        )
    }  # fmt: skip
    config.trainable = [["language/", 5e-5]]
