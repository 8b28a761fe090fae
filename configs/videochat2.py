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
"""

from ml_collections import ConfigDict

from tpo_jax.models.heads import region_mlp, sam2
from tpo_jax.training.config import parse_arg
from tpo_jax.training.families import family_config, set_epochs

BATCH, EPOCHS, SAMPLES = 128, 3, 2_000_000
# Conversation, temporal reasoning, spatial, segmentation.
TPO_SAMPLES = 3_000_000 + 40_000 + 400_000 + 116_500


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, init="", data="runs/data", tiny=False, tpo=False, samples=0)
    config = family_config("videochat2", arg, frames=8, batch=BATCH)
    config.optimizer.update(weight_decay=0.02, warmup=0.2, min_lr_ratio=0.25, clip=0.0)
    config.trainable = [["vision/|connector/", 2e-5], ["language/.*lora_", 2e-5]]
    set_epochs(config, arg, TPO_SAMPLES if arg.tpo else SAMPLES, BATCH, EPOCHS)
    if arg.tpo:
        _add_heads(config, arg)
    return config


def _add_heads(config: ConfigDict, arg: ConfigDict) -> None:
    """Stage 3 of VideoChat-TPO without its temporal head: 16 frames, SAM 2 itself frozen."""
    config.model.heads = ["region_mlp", "sam2"]
    config.optimizer.clip = 1.0
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
