"""Images in tiles as arrays of a row: pixels of tiles, and what each visual token is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from tpo_jax.data.preprocess import anyres_tiles
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import VideoInfo
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.tiling import Tiling, tiling_of

# Room for so many tiles, then for all: how `predict` gathers images of like size. (LLaVA-OneVision
# resizes what is more than 9 tiles of patches.)
LEVELS = (1, 2, 4, 9, 16)


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Fills the rows of a bucket with room for `tiles` tiles an image."""

    tiling: Tiling
    tiles: int

    @property
    def visual_tokens(self) -> int:
        """V"""
        return self.tiling.num_tokens(self.tiles)

    def blank(self) -> dict[str, np.ndarray]:
        side, V, K = self.tiling.tile_size, self.visual_tokens, self.tiling.terms
        return {
            "tiles": np.zeros((self.tiles, side, side, 3), np.uint8),
            "tile_index": np.zeros((V, K), np.int32),
            "tile_weight": np.zeros((V, K), np.float32),
        }

    def fits(self, info: VideoInfo) -> bool:
        return self.tiling.tiles((info.height, info.width)) <= self.tiles

    def check(self, info: VideoInfo) -> None:
        """Raises Invalid for an image of more tiles."""
        if not self.fits(info):
            number = self.tiling.tiles((info.height, info.width))
            raise Invalid(
                "image", f"{info.width} x {info.height} pixels",
                f"it has {number} tiles, but the bucket has tiles = {self.tiles}",
                f"give buckets.*.tiles at least {number}, or add a bucket of images with as many",
            )  # fmt: skip

    def fill(self, row: dict[str, Any], info: VideoInfo) -> int:
        """Says what the tokens of an image are made of; returns how many it has."""
        index, weight = self.tiling.tokens((info.height, info.width), self.tiles)
        row["tile_index"][: len(index)], row["tile_weight"][: len(index)] = index, weight
        return len(index)

    def fill_pixels(self, row: dict[str, Any], frames: np.ndarray) -> np.ndarray:
        """Cuts an image uint8[1, h, w, 3] into tiles; returns the one view that goes with them:
        the image stretched, where its tokens are used, whatever `vision.resize` does to frames."""
        pixels = anyres_tiles(frames[0], self.tiling.connector.resolutions, self.tiling.tile_size)
        row["tiles"][: len(pixels) - 1] = pixels[1:]
        return pixels[:1] if self.tiling.whole else frames


def tiles_of(config: ModelConfig, infos: Iterable[VideoInfo]) -> int:
    """Tiles of the image that has most, videos aside; 0: the model sees images as one view."""
    tiling = tiling_of(config)
    if tiling is None:
        return 0
    sizes = ((info.height, info.width) for info in infos if info.media == "image")
    return max(map(tiling.tiles, sizes), default=0)


def level_of(config: ModelConfig, image: VideoInfo) -> int:
    """The least number of tiles that `predict` has a program for and that holds an image; 0 for a
    model that sees images as one view."""
    tiles = tiles_of(config, [image])
    if not tiles:
        return 0
    most = tiling_of(config).most_tiles()
    return next((level for level in LEVELS if tiles <= level < most), most)
