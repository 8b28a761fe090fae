"""Checks that configuration dataclasses share; an error names field, value and fix."""

from __future__ import annotations

from typing import Any

from tpo_jax.errors import UserError


def require(condition: bool, field: str, value: Any, reason: str) -> None:
    if not condition:
        raise UserError(f"model config: {field}={value!r}: {reason}")


def require_positive(config: Any, prefix: str, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{prefix}.{field}", value, "must be above 0")
