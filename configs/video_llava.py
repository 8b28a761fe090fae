r"""Video-LLaVA-7B (2311.10122): both stages, on images and videos.

    C=configs/video_llava.py
    python -m tpo_jax.train --config=$C:stage=1,init=video_llava --workdir=runs/vl1
    python -m tpo_jax.train --config=$C:stage=2,init=runs/vl1/model --workdir=runs/vl2
    python -m tpo_jax.plan --config=$C:stage=2 --topology=v5e:8x8 \
        --config.mesh.fsdp=16 --config.mesh.tensor=4

Rows of a step divide over 16 devices, so 64 need the last two flags, for `train` as well; other
pods have theirs in experiments/results/plans/README.md.

  1  the connector alone, at 1e-3, global batch 256
  2  connector and language model, at 2e-5, global batch 128

Towers are frozen in both. One epoch each, cosine with 3 % warm-up, no weight decay. Every step
trains on images and videos, in the proportion of the published data (558K : 702K, 665K : 100K),
whose sum is an epoch; `samples`: another number. Rounds of one conversation are asked one by one,
and records of text alone are left out: docs/families.md, "Published mixes".
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import ConfigError, parse_arg
from tpo_jax.training.families import family_config, image_bucket, set_epochs

# Images and videos of a global batch, learning rate, what is trained, samples of the epoch. Both
# parts of a batch divide over 8 devices.
STAGES = {
    "1": (112, 144, 1e-3, "connector/", 558_000 + 702_000),
    "2": (112, 16, 2e-5, "connector/|language/", 665_000 + 100_000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage="2", init="", data="runs/data", tiny=False, samples=0)
    if arg.stage not in STAGES:
        raise ConfigError(f"config argument stage={arg.stage}: expected one of {', '.join(STAGES)}")
    images, videos, rate, trained, samples = STAGES[arg.stage]
    config = family_config("video_llava", arg, frames=8, batch=videos)
    config.optimizer.weight_decay = 0.0
    config.trainable = [[trained, rate]]
    config.buckets.image = image_bucket(config.buckets.video)
    if not arg.tiny:
        config.buckets.image.batch_size = images
    set_epochs(config, arg, samples, images + videos)
    config.buckets.video.beside = "image"
    return config
