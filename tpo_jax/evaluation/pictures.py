"""Drawn predictions for the report: frame strips with boxes and masks, as inline PNG images.

Labels are green, predictions orange, everywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.metrics.mask import boundary

LABEL, PREDICTED = (0, 158, 115), (213, 94, 0)
SIDE = 128  # pixels of one drawn frame
STRIP = 7  # frames


def strip(dataset: PreparedDataset, example: Example, count: int = STRIP) -> str:
    """Plain frames, evenly spaced over the clip."""
    indices = _strip_indices(dataset, example, count)
    return _join([_canvas(frame) for frame in dataset.frames(example.video_id, indices)])


def region(
    dataset: PreparedDataset, example: Example, occurrence: int, result: Mapping[str, Any] | None
) -> str:
    """The frame that is asked about, with the label box and the predicted one."""
    timestamps = dataset.video_info(example.video_id).timestamps
    nearest = int(np.abs(timestamps - example.targets["times"][occurrence]).argmin())
    canvas = _canvas(dataset.frames(example.video_id, np.array([nearest]))[0], side=224)
    _draw_box(canvas, example.targets["boxes"][occurrence], LABEL)
    if result is not None:
        _draw_box(canvas, result["box"], PREDICTED)
    return _join([canvas])


def masks(dataset: PreparedDataset, example: Example, result: Mapping[str, Any] | None) -> str:
    """A strip with the predicted mask filled in and the label's outline."""
    targets = example.targets
    times = targets["times"] if result is None else result["times"]
    frames, labels = benchmarks.match_times(times, targets["times"])
    chosen = _spread(len(frames), STRIP)
    timestamps = dataset.video_info(example.video_id).timestamps
    canvases = []
    for index in chosen:
        frame = int(frames[index])
        nearest = int(np.abs(timestamps - times[frame]).argmin())
        canvas = _canvas(dataset.frames(example.video_id, np.array([nearest]))[0])
        rle = targets["rles"][labels[index]]
        if result is not None and result["masks"][frame] is not None:
            canvas = _fill(canvas, _decode(result["masks"][frame]), PREDICTED)
        if rle is not None:
            canvas = _outline(canvas, _decode(rle), LABEL)
        canvases.append(canvas)
    return _join(canvases)


def track(dataset: PreparedDataset, example: Example, result: Mapping[str, Any] | None) -> str:
    """A strip with the label box and the predicted one."""
    targets = example.targets
    times = targets["times"] if result is None else result["times"]
    frames, labels = benchmarks.match_times(times, targets["times"])
    timestamps = dataset.video_info(example.video_id).timestamps
    canvases = []
    for index in _spread(len(frames), STRIP):
        frame = int(frames[index])
        nearest = int(np.abs(timestamps - times[frame]).argmin())
        canvas = _canvas(dataset.frames(example.video_id, np.array([nearest]))[0])
        label = targets["boxes"][labels[index]]
        if label is not None:
            _draw_box(canvas, label, LABEL)
        if result is not None and result["boxes"][frame] is not None:
            _draw_box(canvas, result["boxes"][frame], PREDICTED)
        canvases.append(canvas)
    return _join(canvases)


def _strip_indices(dataset: PreparedDataset, example: Example, count: int) -> np.ndarray:
    timestamps = dataset.video_info(example.video_id).timestamps
    return np.unique(sampling.uniform(timestamps, count, example.start, example.end))


def _spread(length: int, count: int) -> np.ndarray:
    """At most `count` indices below `length`, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def _canvas(frame: np.ndarray, side: int = SIDE) -> Image.Image:
    height, width = frame.shape[:2]
    scale = side / max(height, width)
    return Image.fromarray(frame).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.NEAREST
    )


def _draw_box(canvas: Image.Image, box: Sequence[float], colour: tuple[int, ...]) -> None:
    """Labels are drawn outside the box and predictions inside, so that equal boxes both show."""
    width, height = canvas.size
    left, top = box[0] * width, box[1] * height
    right, bottom = max(box[2] * width, left + 1), max(box[3] * height, top + 1)
    pen = ImageDraw.Draw(canvas)
    if colour == LABEL:
        pen.rectangle([left - 3, top - 3, right + 3, bottom + 3], outline=colour, width=3)
    else:
        pen.rectangle([left, top, right, bottom], outline=colour, width=2)


def _decode(rle: Mapping[str, Any]) -> np.ndarray:
    return benchmarks.decode_rles([rle], tuple(rle["size"]))[0]


def _fill(canvas: Image.Image, mask: np.ndarray, colour: tuple[int, ...]) -> Image.Image:
    stencil = Image.fromarray(mask.astype(np.uint8) * 150).resize(canvas.size, Image.NEAREST)
    return Image.composite(Image.new("RGB", canvas.size, colour), canvas, stencil)


def _outline(canvas: Image.Image, mask: np.ndarray, colour: tuple[int, ...]) -> Image.Image:
    large = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.NEAREST)
    edge = boundary(np.asarray(large) > 0)
    edge |= np.roll(edge, 1, axis=0) | np.roll(edge, 1, axis=1)
    pixels = np.array(canvas)
    pixels[edge] = colour
    return Image.fromarray(pixels)


def _join(canvases: Sequence[Image.Image], gap: int = 4) -> str:
    """One <img> with the frames side by side."""
    width = sum(canvas.width for canvas in canvases) + gap * (len(canvases) - 1)
    page = Image.new("RGB", (width, max(canvas.height for canvas in canvases)), (255, 255, 255))
    x = 0
    for canvas in canvases:
        page.paste(canvas, (x, 0))
        x += canvas.width + gap
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="frames" width="{width}" src="data:image/png;base64,{data}">'
