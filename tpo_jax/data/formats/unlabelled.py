"""Splits whose labels are kept back by those who publish them, and score what is sent to them.

They are read where `Context.unlabelled` says so and only then: a record without labels is a problem
otherwise, and with it one that has labels. So a training split that lost its labels is not taken
for one of these. Of such a record there is which frames are asked for, and where a track begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpo_jax.data.formats.reading import Context
from tpo_jax.data.problems import Invalid


def check_labels(context: Context, field: str, there: bool) -> None:
    """Refuses labels that are missing, or that are there against what `context.unlabelled` says."""
    if there and context.unlabelled:
        raise Invalid(
            field, None, "it has labels, but --unlabelled says that there are none",
            "leave --unlabelled out, or name the split that has none",
        )  # fmt: skip
    if not there and not context.unlabelled:
        raise Invalid(
            field, None, "the labels are missing",
            "copy them; of a split that is published without labels say --unlabelled",
        )  # fmt: skip


def picture_numbers(context: Context, name: str, field: str) -> list[int]:
    """The numbers of a video's pictures: of its frames, where the annotations do not list them."""
    if context.media is None:
        raise Invalid(field, None, "the annotations do not say how many frames", "say --media")
    return context.media.picture_numbers(name, field)


def targets(
    frames: Sequence[int], times: Sequence[float], size: tuple[int, int], **given: Any
) -> dict[str, Any]:
    """Targets without labels.

    Args:
      frames: numbers that the files of the frames have, n of them.
      times: float[n] seconds.
      size: (width, height) in pixels that masks are to have.
      given: `input_box`, where a track begins.
    """
    width, height = size
    return {
        "unlabelled": True,
        "times": list(times),
        "frames": list(frames),
        "size": [height, width],
    } | given
