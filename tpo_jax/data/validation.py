"""What a single value must satisfy, whatever format it came from: text, times, boxes, masks.

A function returns its value, with rounding cut where it says so, or raises Invalid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tpo_jax.data.problems import Invalid
from tpo_jax.data.rles import rle_pixels

# Published windows and times are rounded; what ends this little after the video is cut to its end.
END_TOLERANCE = 0.5  # seconds
BOX_TOLERANCE = 2e-3  # of the frame: a rounding of the last pixel, cut to the frame


def check_keys(
    data: Any, known: Collection[str], required: Sequence[str], field: str = "",
    ignore: Collection[str] = frozenset(),
) -> None:  # fmt: skip
    """Refuses anything but a dict with all `required` and no key outside `known` and `ignore`."""
    if not isinstance(data, Mapping):
        raise Invalid(field, data, "expected a JSON object", "write it as {...}")
    prefix = f"{field}." if field else ""
    for key in required:
        if key not in data:
            raise Invalid(
                f"{prefix}{key}", None, f"missing; the record has {sorted(data)}", f"add {key!r}"
            )
    for key in data:
        if key not in known and key not in required and key not in ignore:
            raise Invalid(
                f"{prefix}{key}",
                data[key],
                f"unknown key; known are {sorted(set(known) | set(required))}",
                f"correct or remove it, or say --ignore_keys={key}",
            )


def check_text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Invalid(field, value, "expected text that is not empty", "write it, or remove it")
    return value.strip()


def check_number(field: str, value: Any, low: float, high: float, unit: str) -> float:
    """A finite number in [low, high]."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # An int may be too large for a float; comparing them is exact, and False for NaN.
    if not good or not abs(value) <= sys.float_info.max or not low <= value <= high:
        bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise Invalid(field, value, f"expected a number {bound} {unit}".rstrip(), "correct it")
    return float(value)


def check_list(field: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise Invalid(field, value, "expected a list", "write it as [...]")
    return value


def check_window(field: str, value: Any, duration: float) -> list[float]:
    """[start, end] in seconds inside the video."""
    if len(check_list(field, value)) != 2:
        raise Invalid(field, value, "expected [start, end] in seconds", "write two numbers")
    start, end = (check_number(field, v, 0, math.inf, "seconds") for v in value)
    if not start < end:
        raise Invalid(field, value, "expected start < end, in seconds", "swap or correct them")
    if end > duration + END_TOLERANCE or start >= duration:
        raise Invalid(
            field,
            value,
            f"the window goes beyond the duration of the video, {duration:.3f} s",
            "correct the window, or check that the record names the right video",
        )
    return [start, min(end, duration)]


def check_time(field: str, value: Any, duration: float) -> float:
    time = check_number(field, value, 0, math.inf, "seconds")
    if time > duration + END_TOLERANCE:
        raise Invalid(
            field,
            value,
            f"the time is beyond the duration of the video, {duration:.3f} s",
            "correct the time, or check that the record names the right video",
        )
    return min(time, duration)


def check_box(field: str, value: Any) -> list[float]:
    """Normalised [x1, y1, x2, y2] inside the frame."""
    if len(check_list(field, value)) != 4:
        raise Invalid(field, value, "expected [x1, y1, x2, y2]", "write four numbers")
    box = [check_number(field, v, -math.inf, math.inf, "") for v in value]
    low, high = -BOX_TOLERANCE, 1 + BOX_TOLERANCE
    if not all(low <= v <= high for v in box):
        raise Invalid(
            field,
            value,
            "the box is outside the frame: expected [x1, y1, x2, y2] in [0, 1]",
            "divide pixels by the width and height of the frame, or correct the box",
        )
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in box)
    if not (x1 < x2 and y1 < y2):
        raise Invalid(
            field, value, "the box is empty: expected x1 < x2 and y1 < y2", "correct the box"
        )
    return [x1, y1, x2, y2]


def check_rle(field: str, value: Any) -> Mapping[str, Any]:
    """A COCO run-length encoding {"size": [h, w], "counts": str} that decodes."""
    check_keys(value, (), ("size", "counts"), field)
    size = check_size(f"{field}.size", value["size"])
    if not isinstance(value["counts"], str):
        raise Invalid(
            f"{field}.counts", value["counts"], "expected COCO's compressed counts (text)",
            "compress it with pycocotools.mask.frPyObjects",
        )  # fmt: skip
    covered = rle_pixels(value["counts"])
    if covered != size[0] * size[1]:
        raise Invalid(
            f"{field}.counts",
            value["counts"],
            f"the runs cover {covered} pixels, the size {size} says {size[0] * size[1]}",
            "encode the mask again at its own size",
        )
    return value


def check_size(field: str, size: Any) -> Sequence[int]:
    if len(check_list(field, size)) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise Invalid(field, size, "expected [height, width] in pixels", "correct it")
    return size


def check_one_of(field: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise Invalid(field, value, f"expected one of {', '.join(known)}", "correct it")
