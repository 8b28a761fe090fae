"""Task heads: the registry. A new head is one file in this folder and one entry of HEADS.

In the text of an answer a head call is its marker, e.g. "<region>". Tokenised, that is the routing
token, which the model learns to emit, and the slot token, which always follows it and whose hidden
state the head reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpo_jax.models.heads import mask, region, temporal
from tpo_jax.models.heads.base import BOX_MARKER, BOX_TOKEN, ClipInfo, Head, HeadInputs

HEADS: dict[str, Head] = {
    "region": region.HEAD,
    "temporal": temporal.HEAD,
    "mask": mask.HEAD,
}


def head(name: str) -> Head:
    """The registered head, or ValueError that lists the names."""
    if name not in HEADS:
        raise ValueError(f"model config: heads: {name!r} is not a head; known: {sorted(HEADS)}")
    return HEADS[name]


def tokens_of(names: Iterable[str]) -> tuple[str, ...]:
    """Task tokens of these heads in registry order: routing, slot of each; last the box token."""
    chosen = set(names)
    for name in chosen:
        head(name)
    pairs = [(h.routing_token, h.slot_token) for name, h in HEADS.items() if name in chosen]
    return tuple(token for pair in pairs for token in pair) + ((BOX_TOKEN,) if chosen else ())


__all__ = [
    "BOX_MARKER", "BOX_TOKEN", "HEADS", "ClipInfo", "Head", "HeadInputs", "head", "tokens_of",
]  # fmt: skip
