"""Annotated frames: boxes, masks and a timeline with the saliency curve, to PNG and mp4.

Takes events as `routing` returns them ({"task", "slot", "result"}); knows nothing of models.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from tpo_jax.data import files

# One colour per event, repeated; chosen to stay apart on light and on dark frames.
COLOURS = ((255, 140, 0), (0, 170, 255), (230, 60, 180), (120, 200, 0), (250, 220, 0))
MIN_WIDTH = 384  # pixels; smaller frames are enlarged so that the text can be read
MAX_SIDE = 512  # pixels; larger frames are shrunk
TIMELINE_HEIGHT = 72  # pixels
CAPTION_LINE = 14  # pixels
REGION_SECONDS = 0.25  # for how long before and after its time a region is seen


def paper(frame: np.ndarray) -> Image.Image:
    """uint8[h, w, 3] -> image with even sides (H.264 needs it): a frame of more than MAX_SIDE
    pixels is shrunk by area, one that is narrower than MIN_WIDTH becomes several times as large."""
    height, width = frame.shape[:2]
    shrink = max(height, width) > MAX_SIDE
    scale = MAX_SIDE / max(height, width) if shrink else max(1, -(-MIN_WIDTH // width))
    width, height = (max(2, round(side * scale)) for side in (width, height))
    size = (width + width % 2, height + height % 2)
    return Image.fromarray(frame).resize(size, Image.BOX if shrink else Image.NEAREST)


def draw_box(image: Image.Image, box: Sequence[float], colour: tuple[int, int, int]) -> None:
    """Draws one normalised [x1, y1, x2, y2] box in place."""
    width, height = image.size
    x1, y1, x2, y2 = (float(v) for v in box)
    corners = (min(x1, x2) * (width - 1), min(y1, y2) * (height - 1),
               max(x1, x2) * (width - 1), max(y1, y2) * (height - 1))
    ImageDraw.Draw(image).rectangle(corners, outline=colour, width=3)


def draw_mask(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    """Blends a bool[h, w] mask of any size over the image."""
    stencil = Image.fromarray(np.asarray(mask, np.uint8) * 110)
    paint = Image.new("RGB", image.size, colour)
    return Image.composite(paint, image, stencil.resize(image.size, Image.NEAREST))


def timeline(width: int, start: float, end: float,
             tracks: Sequence[tuple[Mapping[str, Any], tuple[int, int, int]]]) -> Image.Image:
    """A strip with each temporal result's window as a span and its saliency as a curve.

    Args:
      width: pixels.
      start: seconds at the left edge.
      end: seconds at the right edge.
      tracks: (temporal result, colour); a result has "windows" [[s, e, score], ...], best first,
        and "saliency" [v, ...] in [0, 1] at "times" [t, ...], in seconds.
    """
    figure = Figure(figsize=(width / 100, TIMELINE_HEIGHT / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.30, 0.96, 0.66))
    for result, colour in tracks:
        rgb = tuple(c / 255 for c in colour)
        for s, e, score in result["windows"]:
            axes.axvspan(s, e, color=rgb, alpha=0.4 * score)
        axes.plot(result["times"], result["saliency"], color=rgb, linewidth=1.5)
    axes.set(xlim=(start, end), ylim=(-0.05, 1.05), yticks=[])
    axes.tick_params(labelsize=6, pad=1)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def wrap(text: str, width: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels in PIL's built-in font."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def annotate(frames: Iterable[np.ndarray], times: np.ndarray, prompt: str, text: str,
             events: Sequence[Mapping[str, Any]]) -> Iterator[np.ndarray]:
    """Yields uint8[H, W, 3] per frame: the frame with boxes and masks, timeline, then the text.

    Args:
      frames: F of uint8[h, w, 3], read one by one.
      times: float32[F] seconds.
      prompt: the user's words.
      text: the answer with results inlined.
      events: {"task", "result"} with results of the heads' `decode`: a region is drawn on the frame
        of its time and those within REGION_SECONDS of it, a mask with its box on each of the F
        frames, a window on the timeline.
    """
    painted = list(zip(events, _cycle_colours(len(events)), strict=True))
    frames = iter(frames)
    first = next(frames)
    base = paper(first)
    width, height = base.size
    lines = wrap(f"> {prompt}", width - 8) + wrap(text, width - 8)
    tracks = [(event["result"], colour) for event, colour in painted if event["task"] == "temporal"]
    has_timeline = bool(tracks) and len(times) > 1
    strip = timeline(width, float(times[0]), float(times[-1]), tracks) if has_timeline else None
    top = height + (TIMELINE_HEIGHT if strip else 0)
    total = top + CAPTION_LINE * len(lines) + 8
    for index, frame in enumerate(itertools.chain([first], frames)):
        page = Image.new("RGB", (width, total + total % 2), (24, 24, 24))
        page.paste(_paint(paper(frame), painted, index, times), (0, 0))
        pen = ImageDraw.Draw(page)
        if strip:
            page.paste(strip, (0, height))
            x = _timeline_x(width, times, index)
            pen.line((x, height, x, height + TIMELINE_HEIGHT - 22), fill=(200, 0, 0), width=2)
        for row, line in enumerate(lines):
            pen.text((4, top + 4 + row * CAPTION_LINE), line, fill=(235, 235, 235))
        yield np.asarray(page)


def _cycle_colours(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _timeline_x(width: int, times: np.ndarray, index: int) -> float:
    span = max(float(times[-1] - times[0]), 1e-6)
    return width * (0.02 + 0.96 * float(times[index] - times[0]) / span)


def _paint(image: Image.Image, painted: Sequence[tuple[Mapping[str, Any], Any]], index: int,
           times: np.ndarray) -> Image.Image:
    """Draws what the events say about frame `index`."""
    for event, colour in painted:
        result = event["result"]
        if event["task"] == "region":
            away = np.abs(times - result["time"])
            if index == int(np.argmin(away)) or away[index] < REGION_SECONDS:
                draw_box(image, result["box"], colour)
        elif event["task"] == "mask":
            image = draw_mask(image, result["masks"][index], colour)
            if result["boxes"][index] is not None:
                draw_box(image, result["boxes"][index], colour)
    return image


def write_png(path: epath.PathLike, page: np.ndarray) -> None:
    """Writes uint8[H, W, 3] (temporary name, then rename)."""
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, format="PNG")
    files.write(path, buffer.getvalue())


def write_mp4(path: epath.PathLike, pages: Iterable[np.ndarray], fps: float) -> None:
    """Writes uint8[H, W, 3] pages of even size, one by one, as H.264 (temporary name, then
    rename)."""
    pages = iter(pages)
    first = next(pages)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate)
        height, width = first.shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20"}
        for page in itertools.chain([first], pages):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
        container.mux(stream.encode())
    files.write(path, buffer.getvalue())
