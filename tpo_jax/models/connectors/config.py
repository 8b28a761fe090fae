"""Configurations of the published connectors; `kind` tells them apart in config.json."""

from __future__ import annotations

import dataclasses

import numpy as np

from tpo_jax.models.checks import require, require_positive

POOLS = ("none", "average", "max", "bilinear")
NEWLINES = ("grid", "frame", "one_token", "no_token")
IMAGES = ("newline", "pool", "plain")


@dataclasses.dataclass(frozen=True)
class MlpConnectorConfig:
    """Two linear layers with GELU, then pooling of video frames and learnt newline tokens.

    The modes decide how many tokens a frame gives. Checkpoints were trained with one of each and
    give bad answers with another, so there are no defaults.
    """

    # Videos: "none" keeps every patch; "average" and "max" drop a last odd row and column,
    # "bilinear" resizes to half, rounded up.
    pool: str
    # Videos: a newline after every row ("grid"), every frame, the whole video, or none.
    newline: str
    # Images are not pooled and end in a newline ("newline") or not ("plain"), or are treated like
    # the frames of a video, without newlines ("pool").
    image: str
    # Patches along one side that become one token.
    stride: int = 2
    # Whether the class token of each video frame is kept, in front of its patches.
    class_token: bool = False
    # SlowFast: every n-th frame keeps `stride`, the others get twice that; each ends in a learnt
    # token. 0: no such variant.
    slow_every: int = 0
    # Images of any resolution: (height, width) in pixels that one may become, cut into tiles, and
    # the number of tiles from which on their grid is resized.
    resolutions: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 0
    kind: str = "mlp"

    def __post_init__(self):
        pairs = tuple(tuple(resolution) for resolution in self.resolutions)  # JSON has lists
        object.__setattr__(self, "resolutions", pairs)
        require_positive(self, "connector", "stride")
        for field, known in (("pool", POOLS), ("newline", NEWLINES), ("image", IMAGES)):
            value = getattr(self, field)
            require(value in known, f"connector.{field}", value, f"use one of {known}")
        require(
            not self.class_token or (self.pool == "none" and self.newline == "no_token"),
            "connector.class_token", self.class_token,
            'a class token has no place in a grid; use pool="none", newline="no_token"',
        )
        require(self.slow_every >= 0, "connector.slow_every", self.slow_every, "0 turns it off")
        require(
            not self.slow_every or (self.newline == "grid" and self.pool != "none"),
            "connector.slow_every", self.slow_every,
            'exists only with newline="grid" and a pool',
        )

    @property
    def has_newline(self) -> bool:
        """Whether there is a newline vector."""
        return self.newline != "no_token" or self.image == "newline"

    def pooled(self, grid: int, stride: int | None = None) -> int:
        """Tokens along one side of a pooled frame of grid x grid patches."""
        stride = stride or self.stride
        if self.pool == "none":
            return grid
        return -(-grid // stride) if self.pool == "bilinear" else grid // stride

    def frame_tokens(self, grid: int, frame: int) -> int:
        """Tokens of one video frame with its newlines."""
        if self.slow_every:
            side = self.pooled(grid, self.stride * (1 if frame % self.slow_every == 0 else 2))
            return side * (side + 1) + 1
        side = self.pooled(grid)
        newlines = {"grid": side, "frame": 1}.get(self.newline, 0)
        return side * side + newlines + self.class_token

    def visual_frames(self, frames: int, grid: int) -> np.ndarray:
        """int32[V]: the frame that must be there for each visual token to be there."""
        if frames == 1:
            side = self.pooled(grid) if self.image == "pool" else grid
            return np.zeros(side * side + (self.image == "newline"), np.int32)
        counts = [self.frame_tokens(grid, frame) for frame in range(frames)]
        tokens = np.repeat(np.arange(frames, dtype=np.int32), counts)
        # What ends the whole video is there whatever its length.
        return np.append(tokens, np.int32(0)) if self.newline == "one_token" else tokens


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Learnt queries that read a whole clip through BERT layers with cross-attention.

    Every clip, of any length, and every image gives queries + extra_queries tokens.
    """

    queries: int
    extra_queries: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    kind: str = "qformer"

    def __post_init__(self):
        require_positive(self, "connector", "queries", "width", "depth", "heads", "mlp_width")
        require(
            self.depth % 2 == 0, "connector.depth", self.depth,
            "must be even: every second layer reads the clip",
        )
        require(
            self.width % self.heads == 0, "connector.heads", self.heads,
            f"must divide connector.width={self.width}",
        )
        require(
            self.extra_queries >= 0, "connector.extra_queries", self.extra_queries, "0 or more"
        )

    def visual_frames(self, frames: int, grid: int) -> np.ndarray:
        """int32[V]: the frame that must be there for each visual token to be there."""
        del frames, grid
        return np.zeros(self.queries + self.extra_queries, np.int32)
