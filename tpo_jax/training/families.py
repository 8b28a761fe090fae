"""What the configs of published families (configs/llava_video.py and others) share."""

import importlib.resources

from ml_collections import ConfigDict

from tpo_jax.training.config import bucket_config, default_config, source_config

# For random weights, which are for planning and tests: any tokenizer will do.
TOKENIZER = str(importlib.resources.files("tpo_jax") / "assets" / "tiny_base" / "tokenizer.json")
TASKS = {"conversation": 1.0}
TINY_FRAMES = 4


def family_config(
    family: str, arg: ConfigDict, *, frames: int, batch: int, size: str = "7b"
) -> ConfigDict:
    """Supervised training on videos; `arg` has init, data and tiny.

    Args:
      size: of the preset that a run without weights has.
    """
    config = default_config()
    if arg.init:
        config.model.preset, config.init_from = "", arg.init
    else:
        config.model.preset = f"{family}_{'tiny' if arg.tiny else size}"
        config.tokenizer = TOKENIZER
    config.data.train = [source_config(f"{arg.data}/train", tasks=TASKS)]
    config.optimizer.update(name="adamw", warmup=0.03, weight_decay=0.0, min_lr_ratio=0.0)
    config.eval_every = 0
    config.buckets = {
        "video": bucket_config(
            media="video", batch_size=8 if arg.tiny else batch,
            frames=TINY_FRAMES if arg.tiny else frames, branches=1,
            branch_tokens=64 if arg.tiny else 1024, answers=48 if arg.tiny else 512,
        )
    }  # fmt: skip
    if arg.tiny:
        config.steps, config.log_every, config.checkpoint.every = 3, 1, 3
    else:
        run_large(config)
        config.mesh = {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}
    return config


def run_large(config: ConfigDict) -> None:
    """How a model of full size runs, of whatever weights."""
    config.model.update(attention="auto", remat="full", dtype="bfloat16")


def set_epochs(
    config: ConfigDict, arg: ConfigDict, published: int, batch: int, epochs: int = 1
) -> None:
    """The steps of whole epochs at full size.

    Args:
      arg: of the config; `samples` is how many there are, 0: as `published`.
    """
    if not arg.tiny:
        config.steps = -(-(arg.samples or published) * epochs // batch)


def image_bucket(video: ConfigDict, tiles: int = 0) -> ConfigDict:
    """The bucket of still images that goes with one of videos; of `tiles` tiles at most, 0: one
    view."""
    return ConfigDict(video.to_dict() | {"media": "image", "frames": 1, "tiles": tiles})


def add_images(config: ConfigDict, arg: ConfigDict) -> None:
    """A bucket of images beside that of videos, where `arg` gives `tiles`."""
    if arg.tiles:
        config.buckets.image = image_bucket(config.buckets.video, arg.tiles)
