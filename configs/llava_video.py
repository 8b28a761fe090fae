r"""LLaVA-Video-7B-Qwen2 (2410.02713): full fine-tuning on videos of 64 frames.

    python -m tpo_jax.convert import --source=LLaVA-Video-7B-Qwen2 --out=llava_video \
        --set conv_template=qwen_1_5
    python -m tpo_jax.train --config=configs/llava_video.py:init=llava_video --workdir=runs/lv
    python -m tpo_jax.plan --config=configs/llava_video.py --topology=v5e:8x8 \
        --config.mesh.fsdp=64 --config.accumulation=4

The last two flags are those with which it fits that pod, for `train` as well; other pods and frames
have theirs in experiments/results/plans/README.md.

Learning rate 1e-5, 2e-6 for the tower, cosine with 3 % warm-up, one epoch of 2.7 M samples (1.6 M
of videos, 1.1 M of images; `samples`: another number; `tiles` adds images, of that many tiles at
most, 36: all). The published global batch is 256 (128
devices, 1 each, accumulated twice). Rounds of one conversation are asked one by one:
docs/families.md, "Published mixes".
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import add_images, family_config, set_epochs

BATCH, SAMPLES = 256, 2_700_000


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, frames=64, samples=0, tiles=0)
    config = family_config("llava_video", arg, frames=arg.frames, batch=BATCH)
    config.time_instruction = not arg.init  # which says so itself
    add_images(config, arg)
    config.trainable = [["vision/", 2e-6], [".*", 1e-5]]
    set_epochs(config, arg, SAMPLES, BATCH)
    return config
