"""The configuration of SAM 2 (Ravi et al. 2024, 2408.00714) as a mask head."""

from __future__ import annotations

import dataclasses

from tpo_jax.models.checks import name_remat, require, require_positive

STAGES = 4
# The first stage stands at a quarter of the image, every other at half of the one before.
FIRST_STRIDE = 4
# Masks come out at the first stage's grid, what objects are looked for in at the third's.
FEATURE_STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Sizes of the network; what all published checkpoints share is in the code.

    `widths`, `depths`, `heads` and `windows` are those of the four stages of Hiera; the first block
    of a later stage pools. Blocks are numbered through all stages.
    """

    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    # Side of the attention window, in cells of the stage.
    windows: tuple[int, ...]
    # Blocks that attend to the whole frame.
    global_blocks: tuple[int, ...]
    # Side of the position table that is stretched over the frame.
    position_grid: int
    # Of the neck, the mask decoder, memory attention and object pointers.
    width: int
    decoder_heads: int
    decoder_mlp_width: int
    # Channels of a prompt mask, of which a quarter after the first convolution.
    mask_channels: int
    iou_width: int
    memory_width: int
    memory_layers: int
    memory_mlp_width: int
    fuser_layers: int
    fuser_mlp_width: int
    # Memories that a frame reads, the prompted frame's among them; pointers likewise.
    memories: int = 7
    pointers: int = 16
    # Whether the place of a pointer in time, and that an object is hidden, are told (SAM 2.1).
    pointer_times: bool = True
    occlusion_embedding: bool = True
    # Pixels in [0, 1] become (pixel - mean) / std.
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # What each block computes again in the backward pass (checks.REMAT).
    remat: str = ""

    def __post_init__(self):
        require_positive(
            self, "sam2", "image_size", "position_grid", "width", "decoder_heads",
            "decoder_mlp_width", "mask_channels", "iou_width", "memory_width", "memory_layers",
            "memory_mlp_width", "fuser_layers", "fuser_mlp_width",
        )  # fmt: skip
        name_remat(self, "sam2.remat")
        for name in ("widths", "depths", "heads", "windows"):
            value = getattr(self, name)
            require(
                len(value) == STAGES and min(value) > 0,
                f"sam2.{name}",
                value,
                f"needs {STAGES} positive numbers, one a stage",
            )
        last = FEATURE_STRIDE * 2
        require(
            self.image_size % last == 0,
            "sam2.image_size",
            self.image_size,
            f"must be a multiple of {last}",
        )
        require(
            (self.image_size // FIRST_STRIDE) % self.windows[0] == 0,
            "sam2.windows",
            self.windows,
            f"the first must divide image_size / {FIRST_STRIDE} = "
            f"{self.image_size // FIRST_STRIDE}, over which its positions are repeated",
        )
        require(
            all(a < b for a, b in zip(self.widths, self.widths[1:], strict=False)),
            "sam2.widths",
            self.widths,
            "must grow from stage to stage",
        )
        require(
            all(w % n == 0 for w, n in zip(self.widths, self.heads, strict=True)),
            "sam2.heads",
            self.heads,
            f"must divide the widths {self.widths}",
        )
        require(
            all(w % 2 == 0 for w in self.windows[:-1]),
            "sam2.windows",
            self.windows,
            "all but the last must be even: the next stage pools inside them",
        )
        require(
            all(0 <= b < sum(self.depths) for b in self.global_blocks),
            "sam2.global_blocks",
            self.global_blocks,
            f"there are blocks 0..{sum(self.depths) - 1}",
        )
        require(
            self.width % (2 * self.decoder_heads) == 0 and self.width % 8 == 0,
            "sam2.width",
            self.width,
            f"must be a multiple of 8 and of 2 * decoder_heads={self.decoder_heads}",
        )
        require(
            self.width % self.memory_width == 0 and self.memory_width % 4 == 0,
            "sam2.memory_width",
            self.memory_width,
            f"must be a multiple of 4 and divide width={self.width}",
        )
        require(
            self.mask_channels % 4 == 0,
            "sam2.mask_channels",
            self.mask_channels,
            "must be a multiple of 4",
        )
        for name in ("memories", "pointers"):
            require(
                getattr(self, name) > 1, f"sam2.{name}", getattr(self, name), "must be 2 or more"
            )

    @property
    def grid(self) -> int:
        """Cells along a side of the features that objects are looked for in."""
        return self.image_size // FEATURE_STRIDE

    @property
    def mask_size(self) -> int:
        """Cells along a side of the mask logits."""
        return self.image_size // FIRST_STRIDE


def hiera(
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    windows: tuple[int, ...],
    global_blocks: tuple[int, ...],
    position_grid: int,
) -> Sam2Config:
    """A published size at 1024 x 1024."""
    return Sam2Config(
        image_size=1024, widths=widths, depths=depths, heads=heads, windows=windows,
        global_blocks=global_blocks, position_grid=position_grid, width=256, decoder_heads=8,
        decoder_mlp_width=2048, mask_channels=16, iou_width=256, memory_width=64, memory_layers=4,
        memory_mlp_width=2048, fuser_layers=2, fuser_mlp_width=1024, remat="full",
    )  # fmt: skip


# As in the configurations of the SAM 2.1 release.
PUBLISHED: dict[str, Sam2Config] = {
    "tiny": hiera((96, 192, 384, 768), (1, 2, 7, 2), (1, 2, 4, 8), (8, 4, 14, 7), (5, 7, 9), 7),
    "small": hiera((96, 192, 384, 768), (1, 2, 11, 2), (1, 2, 4, 8), (8, 4, 14, 7), (7, 10, 13), 7),
    "base_plus": hiera(
        (112, 224, 448, 896), (2, 3, 16, 3), (2, 4, 8, 16), (8, 4, 14, 7), (12, 16, 20), 14
    ),
    "large": hiera(
        (144, 288, 576, 1152), (2, 6, 36, 4), (2, 4, 8, 16), (8, 4, 16, 8), (23, 33, 43), 7
    ),
}


def small(image_size: int, width: int, trunk: int) -> Sam2Config:
    """One block a stage, for models that train on a CPU; `trunk` channels in the second stage.

    A pixel has width / 8 features by which a mask is told from all others.
    """
    return Sam2Config(
        image_size=image_size, widths=(trunk // 2, trunk, trunk * 2, trunk * 4),
        depths=(1, 1, 2, 1), heads=(1, 1, 2, 2), windows=(8, 4, 4, 2), global_blocks=(3,),
        position_grid=4, width=width, decoder_heads=2, decoder_mlp_width=2 * width,
        mask_channels=8, iou_width=width, memory_width=width // 2, memory_layers=1,
        memory_mlp_width=2 * width, fuser_layers=1, fuser_mlp_width=2 * width, memories=4,
        pointers=4,
    )  # fmt: skip


# What a training config may name. "demo" and "micro" are for models that train on a CPU.
SIZES: dict[str, Sam2Config] = PUBLISHED | {"demo": small(64, 64, 32), "micro": small(32, 16, 16)}


def sam2_size(name: str) -> Sam2Config:
    """The named size; ValueError lists the names."""
    require(name in SIZES, "sam2", name, f"use one of {sorted(SIZES)}")
    return SIZES[name]
