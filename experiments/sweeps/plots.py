"""Inline SVG of a sweep: parallel coordinates and learning curves. Lines carry data-run="index"."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpo_jax.evaluation.charts import FAINT, INK, Axes, line, number, svg, ticks

# Worst to best, apart for colour-blind readers (a part of cividis).
_RAMP = ((0xC7, 0xB9, 0x6A), (0x7F, 0x7C, 0x75), (0x2A, 0x5F, 0x9E), (0x00, 0x32, 0x66))
NO_VALUE = "#c9d0d8"


def colours(values: Sequence[float | None], higher_is_better: bool) -> list[str]:
    """A colour a run by the rank of its value: the best is darkest."""
    known = sorted({v for v in values if v is not None}, reverse=not higher_is_better)
    span = max(len(known) - 1, 1)
    rank = {value: (i / span if len(known) > 1 else 1.0) for i, value in enumerate(known)}
    return [NO_VALUE if value is None else _ramp(rank[value]) for value in values]


def parallel_coordinates(
    axes: Mapping[str, Sequence[Any]], hues: Sequence[str], *, width: int = 960, height: int = 320
) -> str:
    """One axis a column, one line a run.

    Args:
      axes: {label: one value a run}; numbers share a scale (logarithmic where they span much),
        anything else is a list of different values. None leaves a gap.
      hues: colour of each run.
    """
    if len(axes) < 2:
        return ""
    left, right, top, bottom = 70, 90, 34, 16
    gap = (width - left - right) / (len(axes) - 1)
    parts, places = [], []
    for column, (label, values) in enumerate(axes.items()):
        x = left + column * gap
        scale, marks = _scale(values)

        def place(value: Any, scale: Any = scale) -> float:
            return height - bottom - scale(value) * (height - top - bottom)

        places.append([None if v is None else (x, place(v)) for v in values])
        parts.append(line(x, top, x, height - bottom, FAINT))
        parts.append(_text(x, 16, label, anchor="middle", weight=600))
        for value, text in marks:
            parts.append(line(x - 4, place(value), x, place(value), FAINT))
            parts.append(_text(x + 5, place(value) + 4, text, colour=FAINT))
    lines = []
    for index, points in enumerate(zip(*places, strict=True)):
        shown = [point for point in points if point is not None]
        if len(shown) > 1:
            lines.append(_polyline(shown, hues[index], index, 1.6))
    return svg(width, height, "parallel coordinates", [*lines, *parts])


def curves(
    series: Sequence[Sequence[tuple[float, float]]],
    hues: Sequence[str],
    *,
    title: str,
    width: int = 460,
    height: int = 250,
) -> str:
    """One line a run over steps.

    Args:
      series: [(step, value), ...] of each run, empty where it has none.
    """
    points = [point for curve in series for point in curve]
    if not points:
        return ""
    axes = Axes(points, width, height, margins=(52, 12, 28, 30), count=5)
    parts = [_text(4, 15, title, weight=600, size=13), *axes.grid("step")]
    lines = []
    for index, curve in enumerate(series):
        if curve:
            placed = [axes.place(*point) for point in curve]
            lines.append(_polyline(placed, hues[index], index, 1.5))
    return svg(width, height, title, [*parts, *lines])


def _scale(values: Sequence[Any]) -> tuple[Any, list[tuple[Any, str]]]:
    """(value -> [0, 1], marks) of an axis."""
    known = [value for value in values if value is not None]
    numeric = known and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in known
    )
    different = sorted(set(known)) if numeric else list(dict.fromkeys(map(str, known)))
    if not numeric:
        step = max(len(different) - 1, 1)
        return (
            lambda value: different.index(str(value)) / step if len(different) > 1 else 0.5,
            [(text, text[:18]) for text in different],
        )
    low, high = different[0], different[-1]
    if low == high:
        return lambda value: 0.5, [(low, number(low))]
    logarithmic = low > 0 and high / low > 8
    place = math.log if logarithmic else float
    marks = different if len(different) <= 6 else [low, *_inner(low, high, logarithmic), high]
    return (
        lambda value: (place(value) - place(low)) / (place(high) - place(low)),
        [(value, number(value)) for value in marks],
    )


def _inner(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers well inside (low, high)."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [10.0**p for p in powers if low * 1.5 < 10.0**p < high / 1.5]
    margin = 0.08 * (high - low)
    return [tick for tick in ticks(low, high, 4) if low + margin < tick < high - margin]


def _ramp(share: float) -> str:
    position = share * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    part = position - index
    mixed = (a + (b - a) * part for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _polyline(points: Sequence[tuple[float, float]], hue: str, run: int, thickness: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline class="run" data-run="{run}" points="{path}" fill="none" stroke="{hue}" '
        f'stroke-width="{thickness}" stroke-linejoin="round"/>'
    )


def _text(
    x: float, y: float, text: Any, *, colour: str = INK, anchor: str = "start", weight: int = 400,
    size: int = 11,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size}" font-weight="{weight}" stroke="#fff" stroke-width="3" '
        f'paint-order="stroke">{html.escape(str(text))}</text>'
    )
