"""A 7B model on a pod: SigLIP and Qwen2-7B shapes with all heads, on data that you prepared.

    python -m tpo_jax.train --config=configs/seven_b.py:data=DIR --dry_run --topology=v5e:8x8
    python -m tpo_jax.train --config=configs/seven_b.py:data=DIR,init=FOLDER --workdir=gs://...

DIR holds train/ and validation/ (docs/own_data.md) and, without `init`, tokenizer.json. `init` is a
model folder of `python -m tpo_jax.convert import`; without it the weights are random. `tiny` has
the smallest model instead, for tests.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from tpo_jax.training.config import bucket_config, default_config, parse_arg, source_config
from tpo_jax.training.families import run_large

HEADS = ["region", "temporal", "mask"]
TASKS = {"conversation": 2.0, "temporal": 1.0, "region": 1.0, "mask": 1.0, "tracking": 1.0}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, data="data", init="", tiny=False)
    config = default_config()
    config.model.update(preset="micro" if arg.tiny else "7b", heads=HEADS)
    if not arg.tiny:
        run_large(config)
    config.init_from = arg.init
    config.init_missing = ["task_tokens/", "box_encoder/", "heads/"] if arg.init else []
    config.tokenizer = "" if arg.init else f"{arg.data}/tokenizer.json"
    config.data.train = [source_config(f"{arg.data}/train", tasks=TASKS)]
    config.data.validation = [source_config(f"{arg.data}/validation", tasks=TASKS)]
    config.buckets = {
        "video": bucket_config(
            media="video", batch_size=8 if arg.tiny else 64, frames=8 if arg.tiny else 32,
            branches=4, branch_tokens=128, answers=96, windows=8,
            mask_size=16 if arg.tiny else 54,
            slots={"region": 8, "temporal": 4, "mask": 4, "box": 4},
        )
    }  # fmt: skip
    config.losses = {
        "language": 1.0, "region/l1": 1.0, "region/giou": 1.0, "region/cells": 1.0,
        "temporal/foreground": 1.0, "temporal/l1": 1.0, "temporal/giou": 1.0,
        "temporal/saliency": 1.0, "mask/focal": 20.0, "mask/dice": 1.0, "mask/cells": 1.0,
        "mask/presence": 1.0,
    }  # fmt: skip
    config.trainable = [
        ["heads/|task_tokens/|box_encoder/", 1e-4],
        ["connector/|language/", 2e-5],
        ["vision/", 2e-6],
    ]
    config.mesh = {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}
    config.steps = 4 if arg.tiny else 5000
    config.checkpoint.update({"every": 250, "keep": 2})
    return config


def sweep(add: Callable[..., None]) -> None:
    """Two rates of the language model, three seeds."""
    for rate in (1e-5, 2e-5):
        for seed in range(3):
            add(seed=seed, **{"trainable[1][1]": rate})
