r"""LongVA-7B (2406.16852): the image stage, and longer videos than it was trained on.

    python -m tpo_jax.convert import --source=LongVA-7B --out=longva \
        --set conv_template=qwen_1_5 --set frames_upbound=128 --set force_sample=true \
        --set add_time_instruction=false   (what its config.json does not say)
    python -m tpo_jax.train --config=configs/longva.py:init=longva --workdir=runs/longva
    python -m tpo_jax.plan --config=configs/longva.py:frames=128 --topology=v5p:4x4x4

Stage 2 of the paper: everything at 1e-5, the tower at 2e-6, cosine with 3 % warm-up. 144 tokens a
frame, no newlines, rope theta 1e9.

Not published: the global batch (longva/scripts/finetune.sh has 4 a GPU and leaves the number of
GPUs to its caller; 64 are 16 GPUs), and the size of the mix (LLaVA-1.6's), so that `steps` is a
number of its own, 1,000, until `samples` says how many an epoch has; the published run has one.
`tiles` adds images to the videos, of that many tiles at most (49: all). Rounds of one conversation
are asked one by one, and records of text alone are left out: docs/families.md, "Published mixes".
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import add_images, family_config, set_epochs

BATCH, STEPS = 64, 1_000


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, frames=64, samples=0, tiles=0)
    config = family_config("longva", arg, frames=arg.frames, batch=BATCH)
    add_images(config, arg)
    config.trainable = [["vision/", 2e-6], [".*", 1e-5]]
    set_epochs(config, arg, STEPS * BATCH, BATCH)
    return config
