"""LLaVA-OneVision as `transformers` has it (Li et al. 2024, 2408.03326).

SigLIP, an MLP, Qwen2. Video frames are resized bilinearly to half and end in one newline; both are
part of `transformers`' model code and no option of its config. Checkpoints on disk have the names
of transformers 4 ("language_model.model."), the model in memory those of transformers 5
("model.language_model."); both are read and each goes back out as it came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    only,
    said,
    tower_config,
    transformers_names,
)
from tpo_jax.interop.families.towers import tower_rows
from tpo_jax.interop.mapping import Row
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.anyres import Size
from tpo_jax.models.connectors.config import MlpConnectorConfig
from tpo_jax.models.published import grids

# What the class of `transformers` has where a config.json does not say.
_CLASS_GRID, _CLASS_RATIO = grids(384, 6), "anyres_max_9"


def model_config(config: Mapping[str, Any], pixels: Pixels) -> ModelConfig:
    only(config, "projector_hidden_act", "gelu")
    only(config, "vision_feature_select_strategy", "full")
    only(config, "multimodal_projector_bias", True)
    layer = config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise FamilyError(f"config.json: vision_feature_layer={layer!r}: this program reads one")
    tower = {"model_type": "siglip_vision_model"} | said(config, "vision_config")
    vision = tower_config(tower, layer=layer, pixels=pixels)
    grid = config.get("image_grid_pinpoints")
    grid = _CLASS_GRID if grid is None else tuple(map(tuple, grid))
    _check_grid(grid, pixels)
    connector = MlpConnectorConfig(
        pool="bilinear", newline="one_token", image="newline", stride=2, resolutions=grid,
        max_tiles=max_tiles(
            config.get("vision_aspect_ratio", _CLASS_RATIO), grid, vision.image_size
        ),
    )  # fmt: skip
    language = {"model_type": "qwen2"} | said(config, "text_config")
    language["tie_word_embeddings"] = bool(
        config.get("tie_word_embeddings") or language.get("tie_word_embeddings")
    )
    return assemble(vision, connector, language)


def _check_grid(grid: Sequence[Size], pixels: Pixels) -> None:
    """Refuses an image processor that cuts other tiles than the model's config.json has."""
    for where, settings in pixels.items():
        given = settings.get("image_grid_pinpoints")
        if given is not None and tuple(map(tuple, given)) != tuple(grid):
            raise FamilyError(
                f"{where}: image_grid_pinpoints={given}, but by config.json they are {list(grid)}: "
                "images would be cut into other tiles than the model joins; correct the one that "
                "is wrong"
            )


def max_tiles(ratio: str, resolutions: Sequence[Size], tile_size: int) -> int:
    """9 of "anyres_max_9"; of "anyres", which resizes no grid, the tiles of the largest resolution;
    0 of "square" or nothing, which has no tiles.

    Raises:
      FamilyError: another mode.
    """
    if ratio == "anyres":
        numbers = ((h // tile_size) * (w // tile_size) for h, w in resolutions)
        return max(numbers, default=0)
    head, _, number = ratio.rpartition("_")
    if head == "anyres_max" and number.isdigit():
        return int(number)
    if ratio not in ("", "square"):
        raise FamilyError(
            f"config.json: aspect ratio of images {ratio!r}: this program has 'square', 'anyres' "
            "and 'anyres_max_N'"
        )
    return 0


def rows(config: ModelConfig, keys: Collection[str]) -> list[Row]:
    prefix, inner, language = transformers_names(keys)
    projector = f"{prefix}multi_modal_projector"
    return [
        *tower_rows(config.vision, "vision/", f"{prefix}vision_tower.{inner}"),
        *mlp_rows(config.connector, f"{projector}.linear_1", f"{projector}.linear_2",
                  f"{prefix}image_newline"),
        *decoder_rows(config.language, **language, keys=keys),
    ]  # fmt: skip


FAMILY = Family(
    name="llava_onevision",
    matches=lambda config: config.get("model_type") == "llava_onevision",
    model_config=model_config,
    rows=rows,
    template=CHATML,  # of which a chat template leaves the end of an answer and the padding
    reads_template=True,
    needs_template=True,
    # The files and the code of `transformers` do not say how many.
    sampling=lambda config: Sampling("evenly", frames_upbound(config)),
    # Some towers hold their pooling head.
    carried=(
        r".*\.position_ids", r".*rotary_emb\.inv_freq",
        r"(model\.)?vision_tower\.(vision_model\.)?head\..*",
    ),  # fmt: skip
    layouts="transformers/models/llava_onevision/modeling_llava_onevision.py",
)
