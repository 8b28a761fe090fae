"""The configuration of a published vision tower."""

from __future__ import annotations

import dataclasses

from tpo_jax.models.checks import name_remat, require, require_positive

KINDS = ("siglip", "siglip2", "clip", "languagebind", "umt")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
RESIZES = ("stretch", "crop", "pad")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """A vision transformer whose parameters exist in published checkpoints.

    siglip and siglip2 have patch tokens only, clip and languagebind a class token before them.
    languagebind is two towers, one for images and one for videos. umt joins space and time.
    """

    kind: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    epsilon: float
    # Which hidden state is the output: 0 is what enters the first layer, -1 what leaves the last.
    layer: int
    # Most frames of a clip.
    max_frames: int
    # Frames that the positions in time were trained for; 0: frames do not see each other. umt
    # interpolates them, languagebind cannot.
    frames: int = 0
    # Pixels in [0, 1] become (pixel - mean) / std.
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # How a frame becomes square: "stretch", "crop" (short side to size, then the middle), or "pad"
    # (a square of the mean colour around an image, while videos are cropped).
    resize: str = "stretch"
    # What each layer computes again in the backward pass (checks.REMAT) / one program per layer
    # instead of a loop.
    remat: str = ""
    unroll: bool = False

    def __post_init__(self):
        require(self.kind in KINDS, "vision.kind", self.kind, f"use one of {KINDS}")
        require_positive(
            self, "vision", "image_size", "patch_size", "width", "depth", "heads", "mlp_width",
            "epsilon", "max_frames",
        )
        name_remat(self, "vision.remat")
        require(
            self.width % self.heads == 0, "vision.heads", self.heads,
            f"must divide vision.width={self.width}",
        )
        require(
            self.activation in ACTIVATIONS, "vision.activation", self.activation,
            f"use one of {ACTIVATIONS}",
        )
        require(
            -self.depth - 1 <= self.layer <= self.depth, "vision.layer", self.layer,
            f"there are hidden states 0..{self.depth}",
        )
        require(self.resize in RESIZES, "vision.resize", self.resize, f"use one of {RESIZES}")
        in_time = self.kind in ("languagebind", "umt")
        require(
            in_time or self.frames == 0, "vision.frames", self.frames,
            f"kind={self.kind!r} has no positions in time; use 0",
        )
        require(
            self.kind != "umt" or self.frames > 0, "vision.frames", self.frames,
            "umt needs the frames that its positions were trained for, 4 in the published tower",
        )
        require(
            self.kind != "languagebind" or not self.frames or self.max_frames == self.frames,
            "vision.max_frames", self.max_frames,
            f"the time embedding of languagebind has {self.frames} positions",
        )

    @property
    def per_frame(self) -> bool:
        """Whether frames do not see each other."""
        return self.frames == 0

    @property
    def layers_run(self) -> int:
        """Layers before the hidden state that is the output; those behind it are only carried."""
        return self.layer if self.layer >= 0 else self.depth + 1 + self.layer

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that fill no whole patch are cut off."""
        return self.image_size // self.patch_size

    @property
    def stem_grid(self) -> int:
        return self.grid

    @property
    def stem_widths(self) -> tuple[int, ...]:
        return (self.width,)
