"""The shipped base model: conversation only, no task tokens, from random weights.

    python -m tpo_jax.train --config=configs/tiny_base.py --workdir=runs/base/run

Reads the folders that `experiments/base.py` prepares under DATA: train, pictures (still images,
which teach colour, form and place at a small price), validation, and tokenizer.json. `tiny` is the
same run with the smallest model and a few steps, for tests.
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import bucket_config, default_config, parse_arg, source_config


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, data="runs/base/data", tiny=False)
    config = default_config()
    config.steps = 6 if arg.tiny else 4000
    config.model = {"preset": "micro" if arg.tiny else "tiny", "heads": []}
    config.tokenizer = f"{arg.data}/tokenizer.json"
    tasks = {"conversation": 1.0}
    config.data.train = [source_config(f"{arg.data}/train", tasks=tasks)]
    config.data.validation = [source_config(f"{arg.data}/validation", tasks=tasks)]
    # Most questions are short; those that list their options and captions need up to 51 tokens.
    # Twelve short or four long ones share one encoded video.
    short = {"branch_tokens": 24, "answers": 12}
    long = {"branch_tokens": 64, "answers": 48}
    rows, frames = (4, 4) if arg.tiny else (8, 32)
    video = {"media": "video", "batch_size": rows, "frames": frames}
    config.buckets = {
        "video": bucket_config(**video, weight=0.35, branches=12, **short),
        "video_long": bucket_config(**video, weight=0.25, branches=4, **long),
    }
    if not arg.tiny:
        config.data.train.append(source_config(f"{arg.data}/pictures", weight=5, tasks=tasks))
        image = {"media": "image", "batch_size": 32, "frames": 1}
        config.buckets["image"] = bucket_config(**image, weight=0.25, branches=4, **short)
        config.buckets["image_long"] = bucket_config(**image, weight=0.15, branches=3, **long)
    config.trainable = [[".*", 2e-3]]
    config.optimizer = {
        "name": "muon", "warmup": 0.03, "weight_decay": 0.05, "clip": 1.0, "min_lr_ratio": 0.05,
    }  # fmt: skip
    config.checkpoint = {"every": 2 if arg.tiny else 250, "keep": 2}
    config.log_every = 1 if arg.tiny else 20
    config.eval_every = 3 if arg.tiny else 500
    config.eval_batches = 1 if arg.tiny else 24
    config.dropout = 0.0
    return config
