"""Shapes and dtypes of a bucket's batch, without data and without a tokenizer.

`plan` compiles for these; a test holds them equal to what `rows.RowBuilder` builds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tpo_jax.data.buckets import Bucket, prefix_positions
from tpo_jax.data.rows import CONTRAST_FIELDS
from tpo_jax.data.targets import TARGETS
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.tiling import tiling_of, visual_frames
from tpo_jax.models.heads import heads_of


def batch_spec(
    bucket: Bucket, model_config: ModelConfig, *, reference: bool = True, contrast: bool = False
) -> dict:
    """Nested dict of jax.ShapeDtypeStruct of one *global* batch.

    Args:
      bucket: of `buckets.fitted`, unless the template closes the visual tokens with one token.
      reference: whether preference rows carry reference log-probabilities (training does,
        scoring does not).
      contrast: whether they bring their manipulated frames.
    """
    B, K, R, A = bucket.batch_size, bucket.branches, bucket.branch_tokens, bucket.answers
    F, size = bucket.frames, model_config.vision.image_size
    V = len(visual_frames(model_config, F, bucket.tiles))
    P = prefix_positions(
        model_config.visual_offset + V + bucket.after_visual + bucket.question)
    spec: dict[str, Any] = {
        "example_ids": _spec(jnp.uint32, B),
        "video_ids": _spec(jnp.uint32, B),
        "frames": _spec(jnp.uint8, B, F, size, size, 3),
        "frame_times": _spec(jnp.float32, B, F),
        "frame_valid": _spec(jnp.bool_, B, F),
        "prefix_tokens": _spec(jnp.int32, B, P),
        "prefix_positions": _spec(jnp.int32, B, P),
        "prefix_segments": _spec(jnp.int32, B, P),
        "branch_tokens": _spec(jnp.int32, B, K, R),
        "branch_positions": _spec(jnp.int32, B, K, R),
        "branch_segments": _spec(jnp.int32, B, K, R),
        "branch_tasks": _spec(jnp.int32, B, K),
        "answer_positions": _spec(jnp.int32, B, K, A),
        "answer_tokens": _spec(jnp.int32, B, K, A),
        "answer_weights": _spec(jnp.float32, B, K, A),
        "slots": _slots(bucket, model_config),
    }
    if tiling := bucket.tiles and tiling_of(model_config):
        spec["tiles"] = _spec(jnp.uint8, B, bucket.tiles, size, size, 3)
        spec["tile_index"] = _spec(jnp.int32, B, V, tiling.terms)
        spec["tile_weight"] = _spec(jnp.float32, B, V, tiling.terms)
    if model_config.clip_features is not None:
        spec["clip_features"] = _spec(jnp.float32, B, F, model_config.clip_features.width)
    if (texts := model_config.text_features) is not None:
        spec["text_features"] = _spec(jnp.float32, B, K, texts.tokens, texts.width)
        spec["text_valid"] = _spec(jnp.bool_, B, K, texts.tokens)
    if bucket.kind == "preference":
        spec["pair_valid"] = _spec(jnp.bool_, B)
        spec["pair_kind"] = _spec(jnp.uint32, B)
        spec["pair_duration"] = _spec(jnp.float32, B)
        if reference:
            spec["reference_logps"] = _spec(jnp.float32, B, K, A)
        if contrast:
            spec |= {f"contrast_{name}": spec[name] for name in CONTRAST_FIELDS}
            if reference:
                spec["reference_contrast_logps"] = _spec(jnp.float32, B, A)
    return spec


def _slots(bucket: Bucket, model_config: ModelConfig) -> dict[str, dict]:
    """Slot arrays of the tasks of the model's heads, and of the user box if there is any head."""
    B = bucket.batch_size
    tasks = [*heads_of(model_config.heads), "box"] if model_config.heads else []
    slots = {}
    for task in tasks:
        S = bucket.capacity(task)
        slots[task] = {"branch": _spec(jnp.int32, B, S), "index": _spec(jnp.int32, B, S)}
        slots[task]["valid"] = _spec(jnp.bool_, B, S)
        for key, array in TARGETS[task].blank(bucket).items():
            slots[task][key] = _spec(array.dtype, B, S, *array.shape)
    return slots


def _spec(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
