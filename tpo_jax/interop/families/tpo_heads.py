"""The heads of VideoChat-TPO (2412.19326): its region MLP, its box encoder and SAM 2 with adapter.

Names are those of OpenGVLab/TPO's model.safetensors.index.json; SAM 2's are those of its own
release (facebookresearch/sam2), where `interop.sam2` has the names of `transformers`. The temporal
head is of another function than the head cg_detr here (docs/families.md) and stays carried.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.towers import linear
from tpo_jax.interop.mapping import Row
from tpo_jax.interop.sam2 import PREFIX, sam2_rows
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import head
from tpo_jax.models.sam2_config import PUBLISHED, Sam2Config

# Head -> its task token's name in the checkpoint, and a tensor by which the head is known.
HEADS = {
    "region_mlp": ("box_token", "loc_decoder.0.weight"),
    "sam2": ("track_token", "track_embed.layers.0.weight"),
}
# Why a head for a task of the checkpoint does not load from it.
_REFUSED = {
    "temporal": "its temporal head is CG-DETR over features of InternVideo2",
    "cg_detr": "its temporal head reads features of InternVideo2 and of another text encoder, this "
    "one the hidden states of the question, with other norms and places",
    "region": "its region head is the MLP that is called region_mlp here",
    "mask": "its mask head is sam2",
}
# The first release of SAM 2, which VideoChat-TPO has: config.json says no sizes.
SAM2 = dataclasses.replace(PUBLISHED["large"], pointer_times=False, occlusion_embedding=False)

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
    sizes: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The configuration with heads of the checkpoint, without the ids of their tokens.

    Args:
      keys: its tensor names.
      chosen: names of heads; None are all that load.
      sizes: fields of Sam2Config, where SAM 2 is not the published one.

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
    heads = there if chosen is None else tuple(name for name in there if name in chosen)
    if not heads:
        return config
    sam2 = None
    if "sam2" in heads:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in (sizes or {}).items()}
        sam2 = Sam2Config(**values) if sizes else SAM2
    return dataclasses.replace(config, heads=heads, sam2=sam2, box_encoder="tpo")


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
        rows += release_rows(config.sam2, PREFIX, "sam.")
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
