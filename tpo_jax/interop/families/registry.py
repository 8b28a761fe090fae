"""The families of published multimodal checkpoints, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tpo_jax.interop.families import llava_onevision, llava_qwen, video_llava, videochat
from tpo_jax.interop.families.base import Family
from tpo_jax.interop.mapping import export_leaves, import_leaves
from tpo_jax.models.config import ModelConfig

FAMILIES: tuple[Family, ...] = (
    llava_onevision.FAMILY,
    llava_qwen.FAMILY,
    video_llava.HUGGINGFACE,
    video_llava.ORIGINAL,
    videochat.FAMILY,
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a config.json is of; None where it is of none."""
    return next((family for family in FAMILIES if family.matches(config)), None)


def named(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)


def to_leaves(
    family: Family, config: ModelConfig, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters by path, carried tensors by their own name).

    Raises:
      MappingError: a tensor is missing, or one that no row uses and `carried` does not name.
    """
    rows = family.rows(config, tensors.keys())
    leaves = import_leaves(rows, tensors, family.carried)
    used = {key for row in rows for key in row.inward(tensors)[1]}
    return leaves, {key: value for key, value in tensors.items() if key not in used}


def from_leaves(
    family: Family,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    carried: Mapping[str, Any],
    keys: Collection[str],
) -> dict[str, Any]:
    """The inverse of `to_leaves`.

    Args:
      keys: tensor names of the checkpoint that the model came from; of the layouts that a family
        has, theirs is written.
    """
    return export_leaves(family.rows(config, keys), leaves) | dict(carried)
