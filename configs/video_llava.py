"""Video-LLaVA-7B (2311.10122): both stages, on images and videos.

    C=configs/video_llava.py
    python -m tpo_jax.train --config=$C:stage=1,init=video_llava --workdir=runs/vl1
    python -m tpo_jax.train --config=$C:stage=2,init=runs/vl1/model --workdir=runs/vl2

  1  the connector alone, at 1e-3, global batch 256
  2  connector and language model, at 2e-5, global batch 128

Towers are frozen in both. One epoch each, cosine with 3 % warm-up, no weight decay. Images and
videos take turns by the share of the published data (558K : 702K and 665K : 100K).
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import ConfigError, parse_arg
from tpo_jax.training.families import family_config, image_bucket

# Samples of images and videos, learning rate, global batch, what is trained.
STAGES = {
    "1": ((558, 702), 1e-3, 256, "connector/"),
    "2": ((665, 100), 2e-5, 128, "connector/|language/"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage="2", init="", data="runs/data", tiny=False)
    if arg.stage not in STAGES:
        raise ConfigError(f"config argument stage={arg.stage}: expected one of {', '.join(STAGES)}")
    (images, videos), rate, batch, trained = STAGES[arg.stage]
    config = family_config("video_llava", arg, frames=8, batch=batch)
    config.optimizer.weight_decay = 0.0
    config.trainable = [[trained, rate]]
    config.buckets.video.weight = float(videos)
    config.buckets.image = image_bucket(config.buckets.video, weight=float(images))
    return config
