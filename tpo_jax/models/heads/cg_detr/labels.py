"""What the labels of a slot say about clips, and which other slot is its negative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpo_jax.models.heads.base import frame_centres
from tpo_jax.models.heads.temporal import assign

# Saliency 1 is full marks of three raters who give 0 to 4.
FULL_MARKS = 12


class ClipLabels(NamedTuple):
    """bool or float32[B, S, F].

    relevant: clips that the query is about. grade: 0 to FULL_MARKS; of a slot without ratings, 1 on
    relevant clips. judged: clips that the labels say anything about.
    """

    relevant: jax.Array
    grade: jax.Array
    judged: jax.Array


def clip_labels(targets: Mapping, valid: jax.Array, frame_valid: jax.Array) -> ClipLabels:
    """From windows, or from ratings where a slot has them.

    Args:
      targets: "windows" float[B, S, W, 2], "window_valid" bool[B, S, W], "saliency" float[B, S, F]
        in [0, 1], -1 where there is none.
      valid: bool[B, S]; frame_valid: bool[B, F].
    """
    window_valid = targets["window_valid"] & valid[..., None]
    windows = targets["windows"].astype(jnp.float32)
    inside, _ = assign(frame_centres(frame_valid), frame_valid, windows, window_valid)
    shown = jnp.broadcast_to(frame_valid[:, None], inside.shape) & valid[..., None]
    saliency = targets["saliency"].astype(jnp.float32)
    rated = shown & (saliency >= 0)
    has_ratings = jnp.any(rated, axis=-1, keepdims=True)
    grade = jnp.where(has_ratings, jnp.round(saliency * FULL_MARKS), inside)
    judged = jnp.where(has_ratings, rated, shown)
    grade = jnp.where(judged, grade, 0.0)
    return ClipLabels(grade > 0, grade, judged)


def next_of_another_video(valid: jax.Array, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The negative of each slot: the next valid slot, cyclically, of another video.

    Args:
      valid: bool[B, S]; videos: [B], equal for rows of one video.

    Returns: index int32[B * S] into the flattened slots, and bool[B * S], whether there is one.
    """
    S = valid.shape[1]
    video, usable = jnp.repeat(videos, S), valid.reshape(-1)
    places = jnp.arange(video.size)
    ahead = (places[None] - places[:, None]) % video.size
    allowed = usable[None] & (video[None] != video[:, None])
    index = jnp.argmin(jnp.where(allowed, ahead, video.size), axis=1)
    return index, jnp.any(allowed, axis=1) & usable
