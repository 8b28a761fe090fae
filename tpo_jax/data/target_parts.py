"""Targets of an example with several markers of one kind, marker by marker.

Boxes of regions lie in lists, one entry a marker. What a window, a mask or a track needs is more
than that, so several of them are a list of targets, `each`, in the order of the text:

    {"each": [{"windows": [[1, 2]]}, {"windows": [[5, 6], [8, 9]]}]}

Several boxes that the user draws are `input_boxes`, and `input_times` if any has a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpo_jax.data.records import Example

SEVERAL = ("each", "input_boxes", "input_times")


def part(targets: Mapping[str, Any], occurrence: int) -> Mapping[str, Any]:
    """What marker number `occurrence` points to, as if it were the only one.

    Entry `occurrence` of each list that is there and long enough; box i and answer i of a tracking
    example belong together. Targets without such lists are those of the only marker.
    """
    if not any(key in targets for key in SEVERAL):
        return targets
    own = {key: value for key, value in targets.items() if key not in SEVERAL}
    if occurrence < len(targets.get("each", ())):
        own |= targets["each"][occurrence]
    for several, one in (("input_boxes", "input_box"), ("input_times", "input_time")):
        if occurrence < len(targets.get(several) or ()):
            own[one] = targets[several][occurrence]
    return own


def about(example: Example, occurrence: int) -> Example:
    """The example with the targets of one marker."""
    return dataclasses.replace(example, targets=part(example.targets, occurrence))


def parts(example: Example) -> list[Example]:
    """`about` of every marker that has targets of its own; of others the example as it is."""
    return [about(example, i) for i in range(len(example.targets.get("each", (None,))))]


def window_count(example: Example) -> int:
    """The most windows that one marker of the example points to."""
    return max((len(one.targets.get("windows", ())) for one in parts(example)), default=0)
