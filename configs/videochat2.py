"""VideoChat2 with Mistral-7B, stage 3 (2311.17005): instruction tuning.

    python -m tpo_jax.convert import --source=VideoChat-TPO --out=videochat2
    python -m tpo_jax.train --config=configs/videochat2.py:init=videochat2 --workdir=runs/vc2

Tower, Q-Former and LoRA (rank 16, also on the output table) are trained at 2e-5; weight decay 0.02,
3 epochs with 0.6 epochs of warm-up, learning rate down to a quarter, 8 frames, 512 tokens of text.
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import family_config


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False)
    config = family_config("videochat2", arg, frames=8, batch=128)
    config.optimizer.update(weight_decay=0.02, warmup=0.2, min_lr_ratio=0.25)
    config.trainable = [["vision/|connector/", 2e-5], ["language/.*lora_", 2e-5]]
    return config
