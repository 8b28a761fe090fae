"""Temporal head of the CG-DETR class: windows and saliency from text-conditioned clips."""

from __future__ import annotations

from tpo_jax.models.heads.base import Head
from tpo_jax.models.heads.cg_detr.decode import decode
from tpo_jax.models.heads.cg_detr.head import CgDetrHead
from tpo_jax.models.heads.cg_detr.losses import COUPLED, NAME, loss, published_weights

HEAD = Head(
    name=NAME,
    task="temporal",
    marker="<temporal>",
    routing_token="<time_begin>",
    slot_token="<temp>",
    module=CgDetrHead,
    loss=loss,
    decode=decode,
    coupled=COUPLED,
    reads_prompt=True,
    reads_clip_features=True,
    reads_text_features=True,
)

__all__ = ["HEAD", "CgDetrHead", "decode", "loss", "published_weights"]
