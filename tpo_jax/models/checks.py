"""Checks that configuration dataclasses share; an error names field, value and fix."""

from __future__ import annotations

from typing import Any

from tpo_jax.errors import UserError

# What a layer keeps of its forward pass for the backward pass; the rest is computed again. "": all
# of it. "full": nothing. "dots": results of matrix products. "dots_no_batch": those of products
# with weights, not those of attention.
REMAT = ("", "full", "dots", "dots_no_batch")


def require(condition: bool, field: str, value: Any, reason: str) -> None:
    if not condition:
        raise UserError(f"model config: {field}={value!r}: {reason}")


def require_positive(config: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{prefix}.{field}", value, "must be above 0")


def name_remat(config: Any, field: str) -> None:
    """Checks config.remat, and puts the name in the place of the bool of older files."""
    if isinstance(config.remat, bool):
        object.__setattr__(config, "remat", "full" if config.remat else "")
    require(config.remat in REMAT, field, config.remat, f"use one of {REMAT}")
