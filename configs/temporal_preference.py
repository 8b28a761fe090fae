"""One run of the studies of Temporal Preference Optimization on long videos of moving shapes.

    python -m experiments.temporal_preference objectives        calls
    python -m tpo_jax.train --config=configs/temporal_preference.py:data=...,pairs=...,count=400 \
        --workdir=...

`data` is the prepared split that the pairs in the folder `pairs` were generated on; `pairs` holds
reference.npz and the manifest `manifest`, of `count` pairs, from which steps follow. `objective` is

  dpo  DPO + 0.5 SFT, beta 0.3, as published for LongVA-TPO (arXiv 2501.13919)
  sft  the chosen answers of the same pairs alone

`frames` are those of a clip, `rate` is the learning rate; `tiny` a few steps of small batches, for
tests.
"""

import importlib.resources

from ml_collections import ConfigDict

from tpo_jax.training.config import (
    ConfigError,
    bucket_config,
    default_config,
    parse_arg,
    source_config,
)

BASE = str(importlib.resources.files("tpo_jax") / "assets" / "tiny_base")
EPOCHS = 1  # as published, of 5 times as many pairs
BATCH_SIZE = 8
# {objective: (losses by weight, weight of sft)}; a loss of weight 0 is only reported.
OBJECTIVES = {"dpo": ({"sigmoid": 1.0}, 0.5), "sft": ({"sigmoid": 0.0}, 1.0)}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, objective="dpo", data="", pairs="", manifest="pairs.jsonl", count=0, frames=32,
        rate=1e-4, tiny=False,
    )  # fmt: skip
    if arg.objective not in OBJECTIVES:
        expected = ", ".join(OBJECTIVES)
        raise ConfigError(f"config argument objective={arg.objective}: expected one of {expected}")
    config = default_config()
    config.objective = "preference"
    config.init_from = BASE
    config.model.preset = ""
    config.data.train = [
        source_config(arg.data, tasks={"preference": 1.0}, pairs=f"{arg.pairs}/{arg.manifest}")
    ]
    config.data.references = [f"{arg.pairs}/reference.npz"]
    losses, sft = OBJECTIVES[arg.objective]
    config.preference.update(beta=0.3, sft=sft)
    with config.ignore_type():  # one name, a list or {name: weight}
        config.preference.loss = losses
    config.steps = 3 if arg.tiny else max(-(-arg.count * EPOCHS // BATCH_SIZE), 1)
    config.data.epochs = 0.0 if arg.tiny else float(EPOCHS)
    config.buckets = {
        "pairs": bucket_config(
            media="video", batch_size=2 if arg.tiny else BATCH_SIZE, frames=arg.frames, question=64,
            branches=2, branch_tokens=64, answers=48, windows=1,
        )
    }  # fmt: skip
    config.optimizer.update(
        name="adamw", warmup=0.1, weight_decay=0.0, clip=1.0, min_lr_ratio=0.0
    )
    # As published: the language model and the projector; the vision encoder is frozen.
    config.trainable = [["language/|connector/", arg.rate]]
    config.checkpoint.update(every=50, keep=1)
    config.log_every = 1 if arg.tiny else 10
    config.eval_every = 0
    return config
