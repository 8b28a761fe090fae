"""Mask head of the SAM 2 class: prompted by the slot, tracked through the clip with a memory."""

from __future__ import annotations

from tpo_jax.models.heads.base import Head
from tpo_jax.models.heads.mask import decode
from tpo_jax.models.heads.sam2.head import Sam2Head
from tpo_jax.models.heads.sam2.losses import NAME, PROMPT_TERMS, loss, published_weights

HEAD = Head(
    name=NAME,
    task="mask",
    marker="<mask>",
    routing_token="<track_begin>",
    slot_token="<tracking>",
    module=Sam2Head,
    loss=loss,
    decode=decode,
    whole_video="follow",
    reads_points=True,
)

__all__ = ["HEAD", "PROMPT_TERMS", "Sam2Head", "decode", "loss", "published_weights"]
