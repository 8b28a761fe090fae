"""The layout of LLaVA-NeXT's code, `llava_qwen`: LLaVA-OneVision, LLaVA-Video and LongVA.

config.json names the tower but not its sizes: those of the named towers are here. Pooling, newline,
merge mode, sampling, time instruction and template are options of config.json; where it does not
say, nothing is assumed. Published files never name the template (that of their code where nobody
asks for another is Vicuna's), so it is always given: `conv_template`, as lmms-eval calls it.
"""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Collection, Mapping
from typing import Any

from tpo_jax.interop.families.base import (
    CHATML,
    Family,
    FamilyError,
    Pixels,
    Sampling,
    assemble,
    decoder_rows,
    frames_upbound,
    mlp_rows,
    said,
    tower_config,
)
from tpo_jax.interop.families.llava_onevision import max_tiles
from tpo_jax.interop.families.towers import tower_rows
from tpo_jax.interop.mapping import Row
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.config import MlpConnectorConfig

# The layer before last is read; LLaVA-NeXT removes SigLIP's last layer, so 26 of 27 are stored.
TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14,
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14,
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}  # fmt: skip
POOLS = ("average", "max", "bilinear")
NEWLINES = ("grid", "frame", "one_token", "no_token")


def model_config(config: Mapping[str, Any], pixels: Pixels) -> ModelConfig:
    """`vision_config` in `config` (not in published files) gives the sizes of another tower."""
    vision = config.get("vision_config") or TOWERS[said(config, "mm_vision_tower", TOWERS)]
    said(config, "mm_projector_type", ("mlp2x_gelu",))
    said(config, "mm_vision_select_feature", ("patch",))
    clip = vision["model_type"] == "clip_vision_model"
    # LLaVA-NeXT's SigLIP takes what leaves its last stored layer, whatever the option says.
    layer = said(config, "mm_vision_select_layer") if clip else -1
    tower = tower_config(vision, layer=layer, pixels=pixels)
    language = collections.ChainMap({"model_type": "qwen2"}, config)
    return assemble(tower, connector_config(config, tower.image_size), language)


def connector_config(config: Mapping[str, Any], tile_size: int) -> MlpConnectorConfig:
    merge = said(config, "mm_patch_merge_type", ("spatial_unpad", "unires"))
    pool = said(config, "mm_spatial_pool_mode", POOLS)
    stride = said(config, "mm_spatial_pool_stride")
    grid = resolutions(config.get("image_grid_pinpoints"), tile_size)
    if merge == "unires":  # images are frames, and there are no newlines
        return MlpConnectorConfig(
            pool=pool, newline="no_token", image="pool", stride=stride, resolutions=grid
        )
    slow_every = said(config, "faster_token_stride") if config.get("add_faster_video") else 0
    return MlpConnectorConfig(
        pool=pool, newline=said(config, "mm_newline_position", NEWLINES), image="newline",
        stride=stride, slow_every=slow_every, resolutions=grid,
        max_tiles=max_tiles(config.get("image_aspect_ratio") or "", grid, tile_size),
    )  # fmt: skip


def resolutions(pinpoints: Any, tile_size: int) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of `image_grid_pinpoints`, which LLaVA-NeXT writes as (width,
    height): a list, a list in a string, or "(1x1),...,(6x6)" in tiles."""
    if not pinpoints:
        return ()
    if isinstance(pinpoints, str) and "x" in pinpoints:
        corners = re.findall(r"\((\d+)x(\d+)\)", pinpoints.replace(" ", ""))
        if "..." in pinpoints:
            (low_w, low_h), (high_w, high_h) = (tuple(map(int, pair)) for pair in corners)
            corners = [(w, h) for w in range(low_w, high_w + 1) for h in range(low_h, high_h + 1)]
        return tuple((int(h) * tile_size, int(w) * tile_size) for w, h in corners)
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (SyntaxError, ValueError) as error:
            raise FamilyError(
                f"config.json: image_grid_pinpoints={pinpoints!r} is no list"
            ) from error
    return tuple((int(height), int(width)) for width, height in pinpoints)


def rows(config: ModelConfig, keys: Collection[str]) -> list[Row]:
    projector = "model.mm_projector."
    return [
        *tower_rows(config.vision, "vision/", "model.vision_tower.vision_tower.vision_model."),
        *mlp_rows(config.connector, f"{projector}0", f"{projector}2", "model.image_newline",
                  "model.faster_token"),
        *decoder_rows(config.language, body="model.", head="lm_head.weight", keys=keys),
    ]  # fmt: skip


def sampling(config: Mapping[str, Any]) -> Sampling:
    """One frame a second up to `frames_upbound`, or always so many spread evenly: `force_sample`,
    as LLaVA-Video has it."""
    frames = frames_upbound(config)
    switch = (True, False)
    method = "evenly" if said(config, "force_sample", switch) else "frames_at_one_fps"
    return Sampling(method, frames, said(config, "add_time_instruction", switch))


def matches(config: Mapping[str, Any]) -> bool:
    """Published LLaVA-OneVision says "llava", for sglang's sake (LLaVA-NeXT issue 130)."""
    if config.get("model_type") == "llava":
        return "LlavaQwenForCausalLM" in (config.get("architectures") or ())
    return config.get("model_type") in ("llava_qwen", "llava_next_qwen")


FAMILY = Family(
    name="llava_qwen",
    matches=matches,
    model_config=model_config,
    rows=rows,
    template=CHATML,
    conversation="qwen_1_5",
    sampling=sampling,
    carried=(
        r".*\.position_ids", r".*rotary_emb\.inv_freq", r".*vision_model\.head\..*",
        # LongVA's "unires" has no newline; files may hold one.
        r"model\.image_newline",
    ),  # fmt: skip
    layouts="LLaVA-VL/LLaVA-NeXT llava/model/llava_arch.py, EvolvingLMMs-Lab/LongVA "
    "longva/longva/model/llava_arch.py",
)
