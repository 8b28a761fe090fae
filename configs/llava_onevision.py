r"""LLaVA-OneVision, video stage, full fine-tuning (2408.03326).

    python -m tpo_jax.convert import --source=llava-onevision-qwen2-7b-ov-hf --out=onevision \
        --set frames_upbound=32
    python -m tpo_jax.train --config=configs/llava_onevision.py:init=onevision --workdir=runs/ov
    python -m tpo_jax.plan --config=configs/llava_onevision.py --topology=v5e:8x8 \
        --config.mesh.fsdp=64 --config.accumulation=2

The last two flags are those with which it fits that pod, for `train` as well; other pods have
theirs in experiments/results/plans/README.md.

`init` is the imported folder; without it the weights are random, for planning. `data` is a folder
that `prepare` wrote; `tiny` is a few steps of a tiny model of the same parts; `samples` is how many
an epoch has, 0: as published; `size` is that of random weights, 7b or 0.5b (one table for both
ends); `tiles` adds images, of that many tiles at most (36: all).

One epoch of 1.6 M samples, 2e-6 for the tower and 1e-5 for the rest: LLaVA-NeXT,
docs/LLaVA_OneVision.md. Global batch 256 (128 devices, 1 each, accumulated twice, "recommended" for
7B), cosine with 3 % warm-up, no weight decay, 32 frames: its scripts/train/finetune_ov.sh.
Without `tiles` every row is a video; of the published samples 350 K are. Rounds of one conversation
are asked one by one, and records of several images or of text alone are left out: docs/families.md,
"Published mixes".
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import add_images, family_config, set_epochs

BATCH, SAMPLES = 256, 1_600_000


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, samples=0, tiles=0, size="7b")
    config = family_config("llava_onevision", arg, frames=32, batch=BATCH, size=arg.size)
    # 32 frames of 196 tokens and one newline; sequences are at most 32,768 long.
    add_images(config, arg)
    config.trainable = [["vision/", 2e-6], [".*", 1e-5]]
    set_epochs(config, arg, SAMPLES, BATCH)
    return config
