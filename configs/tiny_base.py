"""The shipped base model: conversation only, no task tokens, from random weights, in four stages.

    C=configs/tiny_base.py
    python -m tpo_jax.train --config=$C:stage=pictures --workdir=runs/base/pictures
    python -m tpo_jax.train --config=$C:stage=events --workdir=runs/base/events
    python -m tpo_jax.train --config=$C:stage=times --workdir=runs/base/times
    python -m tpo_jax.train --config=$C:stage=videos --workdir=runs/base/videos

  pictures  still images: colour, form and place, at a small part of the price of a video
  events    videos, with questions about what happens and when only, and some images: among all the
            other questions, order and times stayed at chance
  times     the same, once actions are known: only what puts them in order or in seconds
  videos    videos with all questions, and some images

`runs` is the folder that holds what experiments/base.py prepares: data/{train,pictures,validation}
and data/tokenizer.json. `tiny` is a few steps of the smallest model, on videos from random weights,
for tests.
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import (
    ConfigError,
    bucket_config,
    default_config,
    parse_arg,
    source_config,
)

TASKS = {"conversation": 1.0}
EVENT_KINDS = (
    "action", "at_time", "before_after", "earlier", "order", "start", "when", "who",
)  # fmt: skip
TIME_KINDS = (
    "at_time", "before_after", "earlier", "moment", "order", "start", "when", "who",
)  # fmt: skip
# Most questions are short; captions and options that are sentences need up to 51 tokens.
SHORT = {"branch_tokens": 24, "answers": 12}
LONG = {"branch_tokens": 64, "answers": 48}
# Twelve short or four long questions share one encoded video; an image has fewer to ask.
BUCKETS = {
    "image": {"media": "image", "batch_size": 32, "frames": 1, "branches": 4, **SHORT},
    "image_long": {"media": "image", "batch_size": 32, "frames": 1, "branches": 3, **LONG},
    "video": {"media": "video", "batch_size": 8, "frames": 32, "branches": 12, **SHORT},
    "video_long": {"media": "video", "batch_size": 8, "frames": 32, "branches": 4, **LONG},
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage="videos", runs="runs/base", tiny=False)
    stages = {"pictures": _pictures, "events": _events, "times": _times, "videos": _videos}
    if arg.stage not in stages:
        raise ConfigError(f"config argument stage={arg.stage}: expected one of {', '.join(stages)}")
    config = default_config()
    config.data.validation = [source_config(f"{arg.runs}/data/validation", tasks=TASKS)]
    config.optimizer.update(
        name="muon", warmup=0.03, weight_decay=0.05, clip=1.0, min_lr_ratio=0.05
    )
    config.trainable = [[".*", 2e-3]]
    config.checkpoint.update({"every": 250, "keep": 2})
    config.log_every = 20
    config.eval_every = 500
    config.eval_batches = 24
    if arg.tiny:
        _tiny(config, arg.runs)
    else:
        stages[arg.stage](config, arg.runs)
    return config


def _pictures(config: ConfigDict, runs: str) -> None:
    config.model.preset = "tiny"
    config.tokenizer = f"{runs}/data/tokenizer.json"
    config.data.train = [source_config(f"{runs}/data/pictures", tasks=TASKS)]
    config.buckets = _buckets(image=0.6, image_long=0.4)
    config.steps = 2500


def _events(config: ConfigDict, runs: str) -> None:
    _videos_and_pictures(config, runs, EVENT_KINDS)
    config.init_from = f"{runs}/pictures/model"
    config.steps = 3500


def _times(config: ConfigDict, runs: str) -> None:
    _videos_and_pictures(config, runs, TIME_KINDS)
    config.init_from = f"{runs}/events/model"
    config.steps = 2500
    config.optimizer.min_lr_ratio = 1.0  # `videos` decays for both


def _videos(config: ConfigDict, runs: str) -> None:
    _videos_and_pictures(config, runs)
    config.init_from = f"{runs}/times/model"
    config.steps = 3500


def _videos_and_pictures(config: ConfigDict, runs: str, kinds: tuple[str, ...] = ()) -> None:
    config.model.preset = ""
    config.data.train = [
        source_config(f"{runs}/data/train", tasks=TASKS, kinds=kinds),
        source_config(f"{runs}/data/pictures", weight=5, tasks=TASKS),
    ]
    config.buckets = _buckets(video=0.68, video_long=0.2, image=0.08, image_long=0.04)


def _tiny(config: ConfigDict, runs: str) -> None:
    config.model.preset = "micro"
    config.tokenizer = f"{runs}/data/tokenizer.json"
    config.data.train = [source_config(f"{runs}/data/train", tasks=TASKS)]
    config.buckets = _buckets(video=0.6, video_long=0.4)
    for bucket in config.buckets.values():
        bucket.update(batch_size=4, frames=4)
    config.steps, config.checkpoint.every, config.log_every = 6, 2, 1
    config.eval_every, config.eval_batches = 3, 1


def _buckets(**weights: float) -> dict:
    return {name: bucket_config(**BUCKETS[name], weight=weight) for name, weight in weights.items()}
