"""Images in tiles as families publish them: which patches each visual token is made of.

An image becomes tiles of the tower's size. LLaVA-OneVision and LLaVA-Video give the whole image,
then the tiles as one grid without its padding and with a newline after every row; a grid of too
many patches is resized. LongVA (UniRes) pools every tile by itself, like the frame of a video. All
of it is linear in the projected patches and known from the size of the image, so a token is given
as a few patches with weights: numbers of tiles and tokens are static, and images of any size share
a program.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tpo_jax.errors import UserError
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.anyres import Size, best_resolution, packed_size, unpadded
from tpo_jax.models.connectors.config import MlpConnectorConfig
from tpo_jax.models.towers.interpolate import resize_matrix


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a model sees images in tiles.

    Attributes:
      connector: of the model.
      tile_size: side of a tile in pixels.
      grid: patches along the side of a tile.
    """

    connector: MlpConnectorConfig
    tile_size: int
    grid: int

    @property
    def whole(self) -> bool:
        """Whether the whole image goes before its tiles."""
        return self.connector.image == "newline"

    @property
    def terms(self) -> int:
        """K: patches that one token is made of at most."""
        return self._reach**2

    @property
    def _reach(self) -> int:
        """Patches along one side of what becomes one token."""
        pool, stride = self.connector.pool, self.connector.stride
        return stride if not self.whole and pool == "average" else 2

    def tiles(self, size: Size) -> int:
        """Tiles of an image of `size` = (height, width) in pixels, the whole one not counted."""
        return self._number(best_resolution(size, self.connector.resolutions))

    def most_tiles(self) -> int:
        """Tiles of the image that has most."""
        return max(map(self._number, self.connector.resolutions))

    def _number(self, resolution: Size) -> int:
        return (resolution[0] // self.tile_size) * (resolution[1] // self.tile_size)

    def num_tokens(self, tiles: int) -> int:
        """V: tokens of the image of at most so many tiles that has most."""
        return _most_tokens(self, tiles)

    def tokens(self, size: Size, tiles: int) -> tuple[np.ndarray, np.ndarray]:
        """What the tokens of an image of `size` are made of.

        Args:
          tiles: T that there is room for. Patches are counted through the whole image (if it is
            used), T tiles, and one newline.

        Returns: (index int32[n, K], weight float32[n, K]), n <= num_tokens(tiles).
        """
        resolution = best_resolution(size, self.connector.resolutions)
        index, weight = (self._packed if self.whole else self._pooled)(size, resolution, tiles)
        return index.astype(np.int32), weight.astype(np.float32)

    def _pooled(self, size: Size, resolution: Size, tiles: int) -> tuple[np.ndarray, np.ndarray]:
        del size, tiles
        g = self.grid
        places, weights = _terms(_pooling(self.connector, g), self._reach)
        index = places[:, None, :, None] * g + places[None, :, None, :]
        weight = weights[:, None, :, None] * weights[None, :, None, :]
        index, weight = (x.reshape(-1, self.terms) for x in (index, weight))
        number = self._number(resolution)
        index = index + g * g * np.arange(number)[:, None, None]
        return index.reshape(-1, self.terms), np.tile(weight, (number, 1))

    def _packed(self, size: Size, resolution: Size, tiles: int) -> tuple[np.ndarray, np.ndarray]:
        g, side, K = self.grid, self.tile_size, self.terms
        rows, columns = resolution[0] // side, resolution[1] // side
        # The patches of the tiles as one grid [rows * g, columns * g].
        grid = g * g + np.arange(rows * columns * g * g).reshape(rows, columns, g, g)
        grid = grid.swapaxes(1, 2).reshape(rows * g, columns * g)
        (top, left), (h, w) = unpadded(size, grid.shape)
        grid = grid[top : top + h, left : left + w]
        new_h, new_w = packed_size(h, w, self.connector.max_tiles, g)
        y, down = _terms(resize_matrix(new_h, h), self._reach)
        x, along = _terms(resize_matrix(new_w, w), self._reach)
        index = grid[y[:, None, :, None], x[None, :, None, :]].reshape(new_h, new_w, K)
        weight = (down[:, None, :, None] * along[None, :, None, :]).reshape(new_h, new_w, K)
        one = np.eye(1, K)[0]  # all of one patch
        newline = g * g * (1 + tiles) * np.ones((new_h, 1, K), int)
        index = np.concatenate([index, newline], axis=1).reshape(-1, K)
        weight = np.concatenate([weight, np.tile(one, (new_h, 1, 1))], axis=1).reshape(-1, K)
        first = np.repeat(np.arange(g * g)[:, None], K, axis=1)
        return np.concatenate([first, index]), np.concatenate([np.tile(one, (g * g, 1)), weight])


@functools.lru_cache
def _most_tokens(tiling: Tiling, tiles: int) -> int:
    connector, g = tiling.connector, tiling.grid
    fitting = [pair for pair in connector.resolutions if tiling._number(pair) <= tiles]
    if not fitting:
        least = min(map(tiling._number, connector.resolutions))
        raise UserError(f"tiles: {tiles}, but images of the model have {least} or more; give more")
    if not tiling.whole:
        return max(map(tiling._number, fitting)) * connector.pooled(g) ** 2

    def packed(h: int, w: int) -> int:
        h, w = packed_size(h, w, connector.max_tiles, g)
        return h * (w + 1)

    canvases = [tuple(pixels // tiling.tile_size * g for pixels in pair) for pair in fitting]
    # An image fills the canvas in one direction at least.
    return g * g + max(
        max(*(packed(h, width) for h in range(1, height + 1)),
            *(packed(height, w) for w in range(1, width + 1)))
        for height, width in canvases
    )  # fmt: skip


def _pooling(connector: MlpConnectorConfig, grid: int) -> np.ndarray:
    """float64[pooled, grid], what pooling does along one side."""
    side, stride = connector.pooled(grid), connector.stride
    if connector.pool == "none":
        return np.eye(grid)
    if connector.pool == "bilinear":
        return resize_matrix(side, grid)
    cells = np.arange(grid) // stride == np.arange(side)[:, None]
    return cells / stride


def _terms(matrix: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """(index int[n, reach], weight float64[n, reach]) of the entries of each row that are not 0."""
    index = np.argsort(matrix == 0, axis=1, kind="stable")[:, :reach]
    weight = np.take_along_axis(matrix, index, axis=1)
    missing = ((0, 0), (0, reach - index.shape[1]))  # one place alone: a second term of weight 0
    return np.pad(index, missing), np.pad(weight, missing)


def tiling_of(config: ModelConfig) -> Tiling | None:
    """How the model's family tiles images; None: it shows them as one view.

    Raises:
      UserError: tiles would be pooled in a way that is not linear.
    """
    connector = config.connector
    if not isinstance(connector, MlpConnectorConfig) or not connector.resolutions:
        return None
    if connector.image == "newline" and not connector.max_tiles or connector.image == "plain":
        return None
    if connector.image == "pool" and connector.pool == "max":
        raise UserError(
            'connector.pool="max" with connector.image="pool": tiles are pooled by weights, so use '
            "average or bilinear, as published, or leave connector.resolutions empty"
        )
    return Tiling(connector, config.vision.image_size, config.vision.grid)


def visual_frames(config: ModelConfig, frames: int, tiles: int = 0) -> np.ndarray:
    """`config.visual_frames` of a bucket: an image in tiles has one frame."""
    if not tiles:
        return config.visual_frames(frames)
    tiling = tiling_of(config)
    if tiling is None:
        raise UserError(
            f"tiles: {tiles}, but the model's connector sees images as one view "
            f"({config.connector}); give 0"
        )
    return np.zeros(tiling.num_tokens(tiles), np.int32)
