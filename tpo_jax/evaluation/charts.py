"""Inline SVG for the report: line charts, timelines and bars. Text in, text out."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Ink and hues that stay apart for colour-blind readers (Okabe and Ito), on a light page.
INK, FAINT, GRID = "#1d2733", "#6b7785", "#e3e8ee"
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LABEL, PREDICTED = "#009e73", "#d55e00"

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x_label: str = "step",
    width: int = 330,
    height: int = 190,
) -> str:
    """One small chart of several curves, each labelled in the legend below the title.

    Args:
      series: {name: [(x, y), ...]}; points with a y that is not finite are left out.
    """
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return ""
    points = [point for curve in clean.values() for point in curve]
    axes = Axes(points, width, height, margins=(44, 10, 44, 30), count=4)
    parts = [text(4, 14, title, weight=600, size=13), *axes.grid(x_label)]
    offset = 4.0
    for (name, points), hue in zip(clean.items(), HUES * len(clean), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.place(*point) for point in points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{hue}" stroke-width="1.6" '
            'stroke-linejoin="round"/>'
        )
        if len(points) < 25:
            parts += [_dot(*axes.place(*point), hue) for point in points]
        parts.append(line(offset, 28, offset + 14, 28, hue, 3))
        parts.append(text(offset + 18, 32, name, colour=INK))
        offset += 30 + 6.2 * len(name)
    return svg(width, height, title, parts)


class Axes:
    """Two axes in round numbers around some points.

    Args:
      points: [(x, y), ...].
      margins: pixels left, right, above and below.
      count: of numbers on each axis, about.
    """

    def __init__(
        self, points: Points, width: int, height: int, *, margins: tuple[int, ...], count: int
    ):
        xs, ys = ([point[axis] for point in points] for axis in (0, 1))
        self._xs, self._ys = (ticks(min(v), max(v), count) for v in (xs, ys))
        self._width, self._height, self._margins = width, height, margins

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        left, right, top, bottom = self._margins
        across = (x - self._xs[0]) / (self._xs[-1] - self._xs[0])
        up = (y - self._ys[0]) / (self._ys[-1] - self._ys[0])
        return (
            left + across * (self._width - left - right),
            self._height - bottom - up * (self._height - top - bottom),
        )

    def grid(self, x_label: str) -> list[str]:
        """Horizontal lines, the numbers of both axes and the label of the lower one."""
        left, right, _, bottom = self._margins
        parts, end = [], self._width - right
        for tick in self._ys:
            _, y = self.place(self._xs[0], tick)
            parts.append(line(left, y, end, y, GRID))
            parts.append(text(left - 6, y + 4, number(tick), anchor="end", colour=FAINT))
        low = self._height - bottom + 15
        for tick in self._xs:
            x, _ = self.place(tick, self._ys[0])
            parts.append(text(x, low, number(tick), anchor="middle", colour=FAINT))
        return [*parts, text(end, self._height - 2, x_label, anchor="end", colour=FAINT)]


def timeline(
    start: float,
    end: float,
    *,
    labels: Sequence[Sequence[float]],
    predictions: Sequence[Sequence[float]],
    curve: Points = (),
    label_steps: Points = (),
    width: int = 560,
) -> str:
    """Label windows above, predicted windows below, saliency curve between, against seconds.

    Args:
      start, end: seconds at the two edges.
      labels: label windows [[s, e], ...] in seconds.
      predictions: predicted windows [[s, e, score], ...], best first; fainter with lower score.
      curve: predicted saliency [(seconds, value in [0, 1]), ...].
      label_steps: labelled saliency, the same form.
    """
    left, right, middle, height = 78, 8, 62, 128

    def across(t: float) -> float:
        return left + (min(max(t, start), end) - start) / (end - start) * (width - left - right)

    rows = (("label", 8, labels, LABEL), ("predicted", 28, predictions[:3], PREDICTED))
    parts: list[str] = []
    for name, y, windows, hue in rows:
        parts.append(text(left - 8, y + 11, name, anchor="end", colour=INK))
        parts.append(_rect(left, y, width - left - right, 14, GRID))
        best = max((w[2] for w in windows if len(w) > 2), default=1.0) or 1.0
        for window in reversed(list(windows)):
            opacity = 0.25 + 0.75 * window[2] / best if len(window) > 2 else 1.0
            begin, finish = across(window[0]), across(window[1])
            parts.append(_rect(begin, y, max(finish - begin, 1.5), 14, hue, opacity))
    if curve or label_steps:
        parts.append(text(left - 8, middle + 20, "saliency", anchor="end", colour=INK))
        for points, hue in ((label_steps, LABEL), (curve, PREDICTED)):
            path = " ".join(f"{across(t):.1f},{middle + 36 - 36 * v:.1f}" for t, v in points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{hue}" stroke-width="1.6"/>'
            )
    for tick in ticks(start, end, 8):
        if start <= tick <= end + 1e-6:
            anchor = "middle" if tick < end else "end"
            parts.append(
                text(across(tick), height - 6, f"{number(tick)} s", anchor=anchor, colour=FAINT)
            )
    return svg(width, height, "timeline", parts)


def bars(values: Mapping[str, float], *, unit: str, width: int = 560) -> str:
    """Horizontal bars, one a row, with the figure at the end."""
    if not values:
        return ""
    label_width, step = 170, 22
    longest = max(values.values()) or 1.0
    parts = []
    for row, (name, value) in enumerate(values.items()):
        y = row * step
        length = max(value / longest * (width - label_width - 80), 1.0)
        parts.append(text(label_width - 8, y + 15, name, anchor="end", colour=INK))
        parts.append(_rect(label_width, y + 3, length, 15, HUES[0], 0.85))
        figure = f"{number(value)} {unit}".strip()
        parts.append(text(label_width + length + 6, y + 15, figure, colour=FAINT))
    return svg(width, step * len(values) + 4, "bars", parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short figure: 1500 -> "1.5k", 0.25 -> "0.25"."""
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, text: Any, **style: Any) -> str:
    colour, anchor = style.get("colour", INK), style.get("anchor", "start")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{style.get("size", 11)}" font-weight="{style.get("weight", 400)}">'
        f"{html.escape(str(text))}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, thickness: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{thickness}"/>'
    )


def _rect(x: float, y: float, width: float, height: float, hue: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
        f'fill="{hue}" fill-opacity="{opacity:.2f}"/>'
    )


def _dot(x: float, y: float, hue: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{hue}"/>'
