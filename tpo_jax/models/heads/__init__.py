"""Task heads: the registry. A new head is one file in this folder and one entry of HEADS, or one
file anywhere that calls `register` (docs/heads.md).

In the text of an answer a head call is its marker, e.g. "<region>". Tokenised, that is the routing
token, which the model learns to emit, and the slot token, which always follows it and whose hidden
state the head reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpo_jax.errors import UserError
from tpo_jax.models.heads import (
    cg_detr,
    mask,
    region,
    region_mlp,
    sam2,
    temporal,
    temporal_mlp,
)
from tpo_jax.models.heads.base import (
    BOX_MARKER,
    BOX_TOKEN,
    FRAME_TOKENS,
    ClipInfo,
    Head,
    HeadInputs,
)

HEADS: dict[str, Head] = {
    "region": region.HEAD,
    "temporal": temporal.HEAD,
    "mask": mask.HEAD,
    "cg_detr": cg_detr.HEAD,
    "temporal_mlp": temporal_mlp.HEAD,
    "sam2": sam2.HEAD,
    "region_mlp": region_mlp.HEAD,
}


def register(new: Head) -> None:
    """Adds a head to the program that runs; ValueError where a name or a token is taken."""
    if new.name in HEADS or new.name in ("language", "box", FRAME_TOKENS):
        raise ValueError(f"head {new.name!r}: the name is taken; known: {sorted(HEADS)}")
    for other in HEADS.values():
        own, theirs = ((h.routing_token, h.slot_token) for h in (new, other))
        if new.task == other.task and own != theirs:
            raise ValueError(
                f"head {new.name!r}: tokens {own}, but {other.name!r} answers {new.task!r} with "
                f"{theirs}; use those"
            )
        if new.task != other.task and set(own) & {*theirs, BOX_TOKEN}:
            raise ValueError(
                f"head {new.name!r}: tokens {own} belong to {other.name!r} or the box; use others"
            )
    if new.task not in {other.task for other in HEADS.values()} and new.target is None:
        raise ValueError(
            f"head {new.name!r}: task {new.task!r} is new, so it needs a target "
            "(data.targets.SlotTarget)"
        )
    HEADS[new.name] = new


def head(name: str) -> Head:
    """The registered head, or ValueError that lists the names."""
    if name not in HEADS:
        raise UserError(f"model config: heads: {name!r} is not a head; known: {sorted(HEADS)}")
    return HEADS[name]


def heads_of(names: Iterable[str]) -> dict[str, str]:
    """{task: its head} in registry order; ValueError where two heads answer one task."""
    chosen: dict[str, str] = {}
    names = set(names)
    for name in names:
        head(name)
    for name in [name for name in HEADS if name in names]:
        task = HEADS[name].task
        if task in chosen:
            raise UserError(
                f"model config: heads: {chosen[task]!r} and {name!r} both answer {task!r}; keep one"
            )
        chosen[task] = name
    return chosen


def task_tokens() -> dict[str, tuple[str, str]]:
    """{task: (routing token, slot token)} of every registered head, in registry order."""
    return {h.task: (h.routing_token, h.slot_token) for h in HEADS.values()}


def tokens_of(names: Iterable[str]) -> tuple[str, ...]:
    """Task tokens of these heads in registry order: routing, slot of each; last the box token."""
    chosen = {head(name).task for name in names}
    pairs = [pair for task, pair in task_tokens().items() if task in chosen]
    return tuple(token for pair in pairs for token in pair) + ((BOX_TOKEN,) if chosen else ())


__all__ = [
    "BOX_MARKER", "BOX_TOKEN", "HEADS", "ClipInfo", "Head", "HeadInputs", "head", "heads_of",
    "register", "task_tokens", "tokens_of",
]  # fmt: skip
