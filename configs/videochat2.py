"""VideoChat2 with Mistral-7B, stage 3 (2311.17005): instruction tuning; `tpo`: with the heads of
VideoChat-TPO (2412.19326), on conversations, boxes and masks together.

    python -m tpo_jax.convert import --source=VideoChat-TPO --out=videochat2 --set heads=[]
    python -m tpo_jax.train --config=configs/videochat2.py:init=videochat2 --workdir=runs/vc2
    python -m tpo_jax.convert import --source=VideoChat-TPO --out=tpo
    python -m tpo_jax.train --config=configs/videochat2.py:init=tpo,tpo --workdir=runs/tpo

Tower, Q-Former and LoRA (rank 16, also on the output table) are trained at 2e-5; weight decay 0.02,
3 epochs with 0.6 epochs of warm-up, learning rate down to a quarter, 8 frames, 512 tokens of text.
"""

from ml_collections import ConfigDict

from tpo_jax.models.heads import region_mlp, sam2
from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import family_config


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, tpo=False)
    config = family_config("videochat2", arg, frames=8, batch=128)
    config.optimizer.update(weight_decay=0.02, warmup=0.2, min_lr_ratio=0.25)
    config.trainable = [["vision/|connector/", 2e-5], ["language/.*lora_", 2e-5]]
    if arg.tpo:
        _add_heads(config, arg)
    return config


def _add_heads(config: ConfigDict, arg: ConfigDict) -> None:
    """Stage 3 of VideoChat-TPO without its temporal head: 16 frames, SAM 2 itself frozen."""
    config.model.heads = ["region_mlp", "sam2"]
    if not arg.init:
        config.sam2 = "micro" if arg.tiny else "large"
    config.losses.update(region_mlp.published_weights() | sam2.published_weights())
    config.data.train[0]["tasks"].update(region=1.0, mask=1.0)
    config.buckets.video.update(
        frames=4 if arg.tiny else 16, slots={"region": 4, "mask": 1, "box": 1},
        mask_size=16 if arg.tiny else 28,
    )  # fmt: skip
    heads = "heads/region_mlp|heads/sam2/adapter|task_tokens/|box_encoder/"
    config.trainable.append([heads, 2e-5])
