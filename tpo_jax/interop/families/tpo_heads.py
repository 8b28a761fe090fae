"""The heads of VideoChat-TPO (2412.19326): region MLP, box encoder, CG-DETR, SAM 2 with adapter.

Names are those of OpenGVLab/TPO's model.safetensors.index.json; SAM 2's are those of its own
release (facebookresearch/sam2), where `interop.sam2` has the names of `transformers`; CG-DETR's are
in cg_detr_rows.py. That head reads features of a clip encoder and of a text encoder, which the
checkpoint does not hold, so it is loaded where it is asked for and carried otherwise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.cg_detr_rows import cg_detr_rows
from tpo_jax.interop.families.towers import linear
from tpo_jax.interop.mapping import Row
from tpo_jax.interop.sam2 import PREFIX, sam2_rows
from tpo_jax.models.config import ClipFeaturesConfig, ModelConfig, TextFeaturesConfig
from tpo_jax.models.heads import head
from tpo_jax.models.sam2_config import PUBLISHED, Sam2Config

# Head -> its task token's name in the checkpoint, and a tensor by which the head is known.
HEADS = {
    "region_mlp": ("box_token", "loc_decoder.0.weight"),
    "sam2": ("track_token", "track_embed.layers.0.weight"),
    "cg_detr": ("temporal_token", "cg_model.query_embed.weight"),
}
# Why a head for a task of the checkpoint does not load from it.
_REFUSED = {
    "temporal": "its temporal head is CG-DETR, which is called cg_detr here",
    "region": "its region head is the MLP that is called region_mlp here",
    "mask": "its mask head is sam2",
}
# The first release of SAM 2, which VideoChat-TPO has: config.json says no sizes.
SAM2 = dataclasses.replace(PUBLISHED["large"], pointer_times=False, occlusion_embedding=False)
# What its CG-DETR reads, as its app.py does it: 8 frames of every second; at most 80 tokens of
# "summarize:" and the question, last states. Neither is scaled to length 1.
CLIP_FEATURES = ClipFeaturesConfig(768, 1.0, "InternVideo2-CLIP-1B")
TEXT_FEATURES = TextFeaturesConfig(4096, 80, "InternVL-C LLaMA-7B, summarize:")

# Names of `transformers` -> those of SAM 2's release, in the order in which they are applied.
_RENAMED = (
    (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
     "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    # three linear layers, then two
    (r"^(object_pointer_proj|mask_decoder\.(?:output_hypernetworks_mlps\.\{layer\}"
     r"|iou_prediction_head|pred_obj_score_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(object_pointer_proj|mask_decoder\.(?:output_hypernetworks_mlps\.\{layer\}"
     r"|iou_prediction_head|pred_obj_score_head))\.proj_out\.", r"\1.layers.2."),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.1."),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^(vision_encoder\.backbone\.patch_embed)\.projection\.", r"\1.proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings.{layer}."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"\.memory_fuser\.", ".fuser."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv", ".pwconv"),
    (r"(\.fuser\..*)\.scale$", r"\1.gamma"),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mask_downsampler\.final_conv\.", ".mask_downsampler.encoder.12."),
    (r"\.layer_norm(\d?)\.", r".norm\1."),
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
)  # fmt: skip
# Convolution, norm and activation of each of the memory encoder's four steps are one list there.
_STEPS = re.compile(r"\.mask_downsampler\.layers\.(\d)\.(conv|norm)\.")


def with_heads(
    config: ModelConfig,
    keys: Collection[str],
    chosen: Collection[str] | None,
    options: Mapping[str, Any],
) -> ModelConfig:
    """The configuration with heads of the checkpoint, without the ids of their tokens.

    Args:
      keys: its tensor names.
      chosen: names of heads; None are all that read nothing but the video.
      options: config.json; "sam2_config" are the fields of Sam2Config, where SAM 2 is not the
        published one; "cg_config" fields of HeadConfig, "clip_features" and "text_features", where
        CG-DETR has other sizes or is to read features of other encoders.

    Raises:
      FamilyError: a chosen head is not in the checkpoint, or is of another function there.
    """
    there = tuple(name for name, (_, key) in HEADS.items() if key in keys)
    for name in chosen or ():
        if name not in there:
            reason = _REFUSED.get(name) if there else None
            raise FamilyError(
                f"heads: {name!r} does not load from this checkpoint"
                + (f": {reason} (docs/families.md)" if reason else "")
                + f"; heads that do: {list(there)}"
            )
    if chosen is None:
        chosen = [name for name in there if not head(name).reads_clip_features]
    heads = tuple(name for name in there if name in chosen)
    if not heads:
        return config
    changes: dict[str, Any] = {"heads": heads, "box_encoder": "tpo"}
    if "sam2" in heads:
        sizes = options.get("sam2_config") or {}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
        changes["sam2"] = Sam2Config(**values) if sizes else SAM2
    if "cg_detr" in heads:
        changes |= _cg_detr_config(config, options.get("cg_config") or {})
    return dataclasses.replace(config, **changes)


def _cg_detr_config(config: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the head and what it reads; FamilyError for a field that does not exist."""
    given = dict(given)
    parts = {
        "clip_features": (CLIP_FEATURES, given.pop("clip_features", {})),
        "text_features": (TEXT_FEATURES, given.pop("text_features", {})),
        "head": (config.head, given),
    }
    for part, (default, changes) in parts.items():
        known = [field.name for field in dataclasses.fields(default)]
        if unknown := sorted(set(changes) - set(known)):
            more = ["clip_features", "text_features"] if part == "head" else []
            raise FamilyError(
                f"config.json: cg_config: {unknown} is no field of {part}; use {known + more}"
            )
    return {part: dataclasses.replace(default, **new) for part, (default, new) in parts.items()}


def head_rows(config: ModelConfig) -> list[Row]:
    """Rows of the heads of a configuration, of their task tokens and of the box encoder."""
    rows = []
    for name in config.heads:
        if name not in HEADS:
            raise FamilyError(
                f"heads: {name!r} has no place in this layout: "
                f"{_REFUSED.get(name, f'it has {list(HEADS)}')} (docs/families.md)"
            )
        rows.append(Row(f"task_tokens/{head(name).task}", HEADS[name][0], lead=2))
    if config.heads:
        rows += two_layers("box_encoder", "loc_encoder.{}", 2)
    if "region_mlp" in config.heads:
        rows += two_layers("heads/region_mlp/mlp", "loc_decoder.{}", 2)
    if "sam2" in config.heads:
        rows += two_layers("heads/sam2/adapter", "track_embed.layers.{}", 1)
        rows += two_layers("heads/sam2/box_readout", "track_embed_decode2.layers.{}", 1)
        rows += release_rows(config.sam2, PREFIX, "sam.")
    if "cg_detr" in config.heads:
        for part in ("clip_features", "text_features"):
            if getattr(config, part) is None:
                raise FamilyError(
                    f"heads: 'cg_detr' has no place in this layout: there it reads {part}, and the "
                    f"model's config has {part}: null; train it on such features (docs/heads.md)"
                )
        rows += cg_detr_rows(config.head.layers, "heads/cg_detr/", "cg_model.")
    return rows


def two_layers(ours: str, theirs: str, second: int) -> list[Row]:
    """Linear layers 0 and `second` of a list."""
    numbers = (("fc1", 0), ("fc2", second))
    return [row for name, n in numbers for row in linear(f"{ours}/{name}", theirs.format(n))]


def release_rows(config: Sam2Config, ours: str, theirs: str) -> list[Row]:
    """Rows of SAM 2 with the names of its release behind the prefix `theirs`."""
    shared = f"{ours}prompt_encoder/positions/frequencies"
    rows = []
    for row in sam2_rows(config, ours):
        key = theirs + release_key(row.theirs)
        # A table of four rows is four tables; image and prompts share their frequencies.
        lead = int("point_embeddings" in key)
        copies = (shared,) if row.ours == f"{ours}image_positions/frequencies" else ()
        if row.ours != shared:
            rows.append(dataclasses.replace(row, theirs=key, lead=lead, copies=copies))
    return rows


def release_key(key: str) -> str:
    """The release's name of a tensor of `transformers`."""
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return _STEPS.sub(
        lambda m: f".mask_downsampler.encoder.{3 * int(m[1]) + (m[2] == 'norm')}.", key
    )
