"""VideoChat2 with Mistral-7B, stage 3 (2311.17005): instruction tuning; `tpo`: with the heads of
VideoChat-TPO (2412.19326), on conversations, boxes and masks together.

    python -m tpo_jax.convert import --source=VideoChat-TPO --out=videochat2 --set heads=[]
    python -m tpo_jax.train --config=configs/videochat2.py:init=videochat2 --workdir=runs/vc2
    python -m tpo_jax.convert import --source=VideoChat-TPO --out=tpo
    python -m tpo_jax.train --config=configs/videochat2.py:init=tpo,tpo --workdir=runs/tpo

Tower, Q-Former and LoRA (rank 16, also on the output table) are trained at 2e-5; weight decay 0.02,
3 epochs with 0.6 epochs of warm-up, learning rate down to a quarter, no clipping of gradients, 8
frames, 512 tokens of text: OpenGVLab/Ask-Anything,
video_chat2/scripts/videochat_mistral/config_7b_stage3.py. (It takes a frame at random from each of
the 8 parts of a clip; here it is the middle one, as in its evaluation. Its Q-Former has dropout
0.1, in attention too, and stochastic depth 0.2; here it has none.) Its batch is 4 a GPU; the
launcher that names more than one machine (videochat_vicuna/slurm_run_7b_stage3.sh) has 32
GPUs, so 128. `samples` is how many an epoch has, 0: as published, 2 M records of VideoChat2-IT.
`tpo` has the 3,556,500 of VideoChat-TPO's stage 3 (Table 18) without the 7.5 K of its temporal
task, at batch 128, as its text says; Table 17 has 256. Its public run clips gradients to 1.

A step shows videos or images, as often as there are questions about them; of sets with both half
are taken to be images. `media=video` or `media=image` is for data that has no other. Rounds of one
conversation are asked one by one: docs/families.md, "Published mixes".
"""

from ml_collections import ConfigDict

from tpo_jax.models.heads import region_mlp, sam2
from tpo_jax.training.config import ConfigError, parse_arg
from tpo_jax.training.families import family_config, image_bucket, set_epochs

BATCH, EPOCHS = 128, 3
SAMPLES = {"video": 1_000_000, "image": 1_000_000}
# Conversation, temporal reasoning, segmentation; conversation, spatial.
TPO_SAMPLES = {"video": 1_500_000 + 40_000 + 116_500, "image": 1_500_000 + 400_000}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, tpo=False, samples=0,
                    media="video+image")  # fmt: skip
    samples, media = TPO_SAMPLES if arg.tpo else SAMPLES, arg.media.split("+")
    if set(media) - set(samples):
        expected = "video, image or video+image"
        raise ConfigError(f"config argument media={arg.media}: expected {expected}")
    config = family_config("videochat2", arg, frames=8, batch=BATCH)
    config.optimizer.update(weight_decay=0.02, warmup=0.2, min_lr_ratio=0.25, clip=0.0)
    config.trainable = [["vision/|connector/", 2e-5], ["language/.*lora_", 2e-5]]
    set_epochs(config, arg, sum(samples.values()), BATCH, EPOCHS)
    config.buckets.image = image_bucket(config.buckets.video)
    if arg.tpo:
        _add_heads(config, arg)
    config.buckets = {medium: config.buckets[medium] for medium in media}
    for medium in media:
        config.buckets[medium].weight = samples[medium]
    return config


def _add_heads(config: ConfigDict, arg: ConfigDict) -> None:
    """Stage 3 of VideoChat-TPO without its temporal head: 16 frames, SAM 2 itself frozen."""
    config.model.heads = ["region_mlp", "sam2"]
    config.optimizer.clip = 1.0
    if not arg.init:
        config.sam2 = "micro" if arg.tiny else "large"
    config.losses.update(region_mlp.published_weights() | sam2.published_weights())
    config.data.train[0]["tasks"].update(region=1.0, mask=1.0, tracking=1.0)
    video, image = config.buckets.video, config.buckets.image
    video.update(frames=4 if arg.tiny else 16, slots={"region": 4, "mask": 1, "box": 1})
    # As in configs/videochat_tpo.py: masks are asked of videos alone, and answers about images may
    # name many objects.
    image.update(slots={"region": 16}, idle=["mask"])
    video.mask_size = image.mask_size = 16 if arg.tiny else 28
    heads = "heads/region_mlp|heads/sam2/(?!network)|task_tokens/|box_encoder/"
    config.trainable.append([heads, 2e-5])
