"""Temporal head of two linear layers: one window, from the slot state alone.

It never looks at the video, so all that it says the language model has to know already. It is what
stronger heads are compared with (Task Preference Optimization, 2412.19326, table 11).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import temporal
from tpo_jax.models.heads.base import ClipInfo, Head, HeadInputs
from tpo_jax.models.heads.geometry import span_giou
from tpo_jax.models.layers import Mlp, Rngs
from tpo_jax.parallel.weighted_sum import WeightedSum


class TemporalMlp(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width = config.language.width
        self.mlp = Mlp(width, width, 2, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Returns: "spans" float32[B, S, 2], two ends normalised to the clip, in any order."""
        return {"spans": jax.nn.sigmoid(self.mlp(inputs.slot_states))}


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """L1 (sum over both ends) and 1 - GIoU to the nearest window; one unit of weight a slot.

    Args:
      predictions: "spans" float32[B, S, 2], two ends normalised to the clip, in any order.
      targets: "windows" [B, S, W, 2] start and end, normalised to the clip; "window_valid"
        bool[B, S, W].
      valid: bool[B, S], slots in use.
    """
    windows, there = targets["windows"].astype(jnp.float32), targets["window_valid"]
    spans = jnp.sort(predictions["spans"], axis=-1)[..., None, :]
    # Where there is no target, a fixed non-degenerate span keeps the (unused) gradient finite.
    windows = jnp.where(there[..., None], windows, jnp.array([0.25, 0.75]))
    distance = jnp.sum(jnp.abs(spans - windows), axis=-1)
    nearest = jnp.argmin(jnp.where(there, distance, jnp.inf), axis=-1, keepdims=True)
    _, giou = span_giou(jnp.broadcast_to(spans, windows.shape), windows)
    has_windows = valid & jnp.any(there, axis=-1)
    terms = {"temporal_mlp/l1": distance, "temporal_mlp/giou": 1.0 - giou}
    return {
        name: WeightedSum.of(jnp.take_along_axis(value, nearest, axis=-1)[..., 0], has_windows)
        for name, value in terms.items()
    }


def decode(prediction: Mapping[str, np.ndarray], clip: ClipInfo) -> dict:
    """Results as of the temporal head, of spans float[2]: one window in seconds, and frames inside
    it are salient."""
    shown = np.asarray(clip.frame_valid, bool)
    times = np.asarray(clip.times, np.float64)[shown]
    ends = np.sort(np.asarray(prediction["spans"], np.float64))
    start, end = clip.start + ends * (clip.end - clip.start)
    inside = (start <= times) & (times <= end)
    return {
        "windows": [[float(start), float(end), 1.0]],
        "saliency": inside.astype(float).tolist(),
        "times": times.tolist(),
    }


HEAD = Head(
    name="temporal_mlp",
    marker=temporal.HEAD.marker,
    routing_token=temporal.HEAD.routing_token,
    slot_token=temporal.HEAD.slot_token,
    module=TemporalMlp,
    loss=loss,
    decode=decode,
    task="temporal",
)
