"""Video files, folders of numbered pictures and image files to frames with their true times.

Frames are what is on screen at the ticks start, start + 1/fps, start + 2/fps, ...: of two ticks
that show the same frame (variable frame rate, a low source rate) only one is kept, and its time is
its own presentation time, not the tick's. Times are seconds from the first frame of the file.
A folder of numbered pictures ("00000.jpg", "00005.jpg", ...) is a video whose frame rate the caller
says. Display rotation (phone videos, EXIF) is applied. Whatever cannot be decoded completely raises
a VideoError. A cut in a container that states no frame count and no duration (MPEG-TS, raw streams)
is not visible to any reader; what is left of it decodes as a shorter video.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from tpo_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".ogv", ".ogg", ".flv", ".wmv", ".3gp"),
)
# A tick that misses a presentation time by rounding of the container's time base still hits it.
TICK_TOLERANCE = 1e-3
# How far the frames may fall short of a duration in the header, except where the header's is exact.
DURATION_TOLERANCE = 0.5

PathLike = str | os.PathLike[str]
# Rising times in seconds, each with what makes its frame uint8[h, w, 3].
LazyFrames = Iterator[tuple[float, Callable[[], np.ndarray]]]


class VideoError(UserError):
    """A media file that cannot be used: which one, why, and what to do about it."""

    def __init__(self, file: PathLike, reason: str, fix: str):
        super().__init__(f"{os.fspath(file)}: {reason}; {fix}")
        self.file, self.reason, self.fix = os.fspath(file), reason, fix

    def __reduce__(self):
        return VideoError, (self.file, self.reason, self.fix)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the header of a file says; `width` and `height` are after rotation, in pixels.

    `duration` is in seconds and 0 where the header does not say; `frames` likewise. `rate` is
    the average frame rate in Hz, 0 if unknown; `rotation` in degrees counter-clockwise.
    """

    media: str
    width: int
    height: int
    duration: float
    frames: int
    rate: float
    rotation: int
    codec: str


@dataclasses.dataclass(frozen=True)
class Video:
    """Decoded frames uint8[n, h, w, 3], their times float32[n] and the duration, in seconds."""

    media: str
    timestamps: np.ndarray
    frames: np.ndarray
    duration: float


def media_kind(path: PathLike) -> str:
    """ "video" or "image", by suffix and, for GIF and WebP, by the number of pictures inside."""
    if pathlib.Path(path).is_dir():
        return "video"
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix not in IMAGE_SUFFIXES:
        raise VideoError(
            path,
            f"the suffix {suffix!r} is not a known video or image type",
            f"use one of {' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}",
        )
    if suffix in (".webp", ".gif"):
        with _open_image(path) as image:
            return "video" if image.is_animated else "image"
    return "image"


def probe(path: PathLike) -> Probe:
    """Reads the header (and, for rotation, the first frame). Raises VideoError."""
    if pathlib.Path(path).is_dir():
        found = pictures(path)
        first = _probe_image(found[0][1])
        return dataclasses.replace(first, media="video", frames=len(found))
    if pathlib.Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return _probe_image(path)
    with _open_video(path) as (container, stream), _ffmpeg_errors(path):
        first = next(container.decode(stream), None)
        if first is None:
            raise _no_frames(path)
        rotation = first.rotation % 360
        height, width = first.height, first.width
        return Probe(
            "video",
            *((height, width) if rotation in (90, 270) else (width, height)),
            _stated_duration(container, stream) or 0.0,
            stream.frames,
            float(stream.average_rate or 0),
            rotation,
            stream.codec_context.name,
        )


def read_video(
    path: PathLike,
    fps: float | None = None,
    start: float = 0.0,
    end: float = math.inf,
    size: int | tuple[int, int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Video:
    """All chosen frames of one file in memory; see `Decoder` for the other arguments and errors.

    Args:
      numbers: rising, those of the decoder's frames that are made; None: all. What comes after the
        last of them is not read, and `duration` stays the header's.
    """
    decoder = Decoder(path, fps, start, end, size)
    chosen = iter(decoder) if numbers is None else decoder.only(numbers)
    times, frames = zip(*chosen, strict=True)
    return Video(decoder.media, np.asarray(times, np.float32), np.stack(frames), decoder.duration)


def pictures(folder: PathLike) -> list[tuple[int, pathlib.Path]]:
    """(number, file) of the pictures right in a folder, in the order of the last number of their
    names. Raises VideoError for none, for a name without a number and for a number used twice."""
    found: dict[int, pathlib.Path] = {}
    for file in pathlib.Path(folder).iterdir():
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        digits = re.findall(r"\d+", file.stem)
        if not digits or int(digits[-1]) in found:
            raise VideoError(
                folder,
                f"the picture {file.name} has no number of its own",
                "name the frames 00000.jpg, 00001.jpg, ...",
            )
        found[int(digits[-1])] = file
    if not found:
        raise VideoError(folder, "the folder has no picture", "correct the path")
    return sorted(found.items())


class Decoder:
    """Iterates over (time in seconds, frame uint8[h, w, 3]); `duration` is known at the end.

    Args:
      path: a video or image file, or a folder of numbered pictures. An image is one frame at time
        0 with duration 0.
      fps: ticks per second; None keeps every frame.
      start, end: only frames on screen in [start, end), in seconds. With an `end` inside the video
        the rest is not read, hence not checked, and `duration` stays the header's.
      size: resize to (height, width), or to a square; the aspect ratio is not kept. None = native.
      frame_rate: pictures a second of a folder of pictures; not used otherwise.

    Raises:
      VideoError: missing, empty, damaged or truncated file, no frame in [start, end).
    """

    def __init__(
        self,
        path: PathLike,
        fps: float | None = None,
        start: float = 0.0,
        end: float = math.inf,
        size: int | tuple[int, int] | None = None,
        frame_rate: float | None = None,
    ):
        if not 0 <= start < end:
            raise ValueError(f"{path}: need 0 <= start < end, got start={start} end={end}")
        if fps is not None and not fps > 0:
            raise ValueError(f"{path}: fps is {fps}, expected a positive number of ticks a second")
        self.path, self.fps, self.start, self.end = path, fps, start, end
        self.size = (size, size) if isinstance(size, int) else size
        self.frame_rate = frame_rate
        self.media = media_kind(path)
        self.duration = math.nan

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        return ((time, convert()) for time, convert in self.lazily())

    def only(self, numbers: Sequence[int]) -> Iterator[tuple[float, np.ndarray]]:
        """Those of its frames with these rising numbers, as it counts them from 0."""
        wanted = set(numbers)
        for number, (time, convert) in enumerate(itertools.islice(self.lazily(), numbers[-1] + 1)):
            if number in wanted:
                yield time, convert()

    def lazily(self) -> LazyFrames:
        """(time, what makes the frame) of the same frames; one that is not made costs no pixels."""
        if self.media == "image":
            self.duration = 0.0
            yield 0.0, lambda: _image_to_array(self.path, self.size)
            return
        if pathlib.Path(self.path).is_dir():
            source = self._pictures()
        elif pathlib.Path(self.path).suffix.lower() in IMAGE_SUFFIXES:
            source = self._animation()
        else:
            source = self._video()
        count = 0
        for time, convert in self._at_ticks(source):
            yield time, convert
            count += 1
        if not count:
            raise VideoError(
                self.path,
                f"no frame is on screen between {self.start:g} s and {self.end:g} s "
                f"(the video ends at {self.duration:.3f} s)",
                "correct start and end",
            )

    def _at_ticks(self, source: LazyFrames) -> LazyFrames:
        """Keeps the (time, convert) pairs that are on screen at a tick, each once."""
        tick = self.start
        pending = None
        for time, convert in source:
            if pending and self._shows_tick(pending[0], time, tick):
                yield pending
                tick = self._next_tick(time)
            if time >= self.end:
                return
            pending = (time, convert)
        if pending and self._shows_tick(pending[0], max(self.duration, pending[0] + 1e-6), tick):
            yield pending

    def _shows_tick(self, shown: float, hidden: float, tick: float) -> bool:
        """Whether a frame on screen in [shown, hidden) is the one to keep for `tick`."""
        if self.fps is None:
            return hidden > self.start + TICK_TOLERANCE
        return hidden > tick + TICK_TOLERANCE

    def _next_tick(self, time: float) -> float:
        if self.fps is None:
            return time
        return self.start + math.ceil((time - self.start - TICK_TOLERANCE) * self.fps) / self.fps

    def _video(self) -> LazyFrames:
        """(time, convert) of the frames from `start` on; times rise strictly."""
        with _open_video(self.path) as (container, stream), _ffmpeg_errors(self.path):
            origin = _origin(stream)
            stated = _stated_duration(container, stream)
            self.duration = stated or math.nan
            if self.start > 0 and origin is not None:
                container.seek(int((self.start + origin) / stream.time_base), stream=stream)
            reformatter = VideoReformatter()
            index, packets, last, shown = 0, 0, -math.inf, 0.0
            for packet in container.demux(stream):
                packets += bool(packet.size)
                for frame in packet.decode():
                    if packet.is_corrupt or frame.is_corrupt:
                        raise _truncated(self.path, f"the frame after {max(last, 0):.3f} s is cut")
                    absolute = frame.time
                    if absolute is None:  # raw streams carry no times
                        absolute = index / float(stream.average_rate or 25)
                    origin = absolute if origin is None else origin
                    index += 1
                    time = absolute - origin
                    if time <= last:
                        continue  # a second picture for the same instant never reaches the screen
                    shown = _shown_for(frame, stream, time - last)
                    last = time
                    yield time, lambda frame=frame: _to_array(frame, reformatter, self.size)
            if not index:
                raise _no_frames(self.path)
            self.duration = last + shown
            if self.start == 0:
                _check_frame_count(self.path, container, stream, packets, self.duration)
            tolerance = max(1.5 * shown, 0 if "DURATION" in stream.metadata else DURATION_TOLERANCE)
            if stated and self.duration < stated - tolerance:
                raise _truncated(
                    self.path, f"it ends at {self.duration:.3f} s, its header says {stated:.3f} s"
                )

    def _pictures(self) -> LazyFrames:
        """(time, convert) of each picture of a folder; the first is at time 0."""
        if not self.frame_rate:
            raise VideoError(
                self.path,
                "a folder of pictures does not say its frame rate",
                "give it (--frame_rate)",
            )
        numbered = pictures(self.path)
        times = [(number - numbered[0][0]) / self.frame_rate for number, _ in numbered]
        gap = times[-1] - times[-2] if len(times) > 1 else 1 / self.frame_rate
        self.duration = times[-1] + gap
        for time, (_, file) in zip(times, numbered, strict=True):
            yield time, lambda file=file: _image_to_array(file, self.size)

    def _animation(self) -> LazyFrames:
        """(time, convert) of each picture of an animated GIF or WebP."""
        with _open_image(self.path) as image:
            time = 0.0
            for index in range(image.n_frames):
                with _pillow_errors(self.path):
                    image.seek(index)
                    image.load()
                picture = image.convert("RGBA")
                yield time, lambda picture=picture: _flatten(picture, self.size)
                time += (image.info.get("duration") or 100) / 1000  # browsers show 0 ms as 100 ms
            self.duration = time


@contextlib.contextmanager
def _open_video(path: PathLike) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Yields (container, first video stream)."""
    _check_file(path)
    with _ffmpeg_errors(path), av.open(os.fspath(path)) as container:
        if not container.streams.video:
            raise VideoError(
                path, "it has no video stream", "remove it, or replace it by an intact video file"
            )
        stream = container.streams.video[0]
        if stream.codec_context is None or not stream.codec_context.width:
            raise VideoError(
                path,
                "its video stream has no usable codec header (truncated, or an unknown codec)",
                "copy or download it again, or convert it to H.264",
            )
        stream.codec_context.thread_count = 1  # preparation is parallel over files
        yield container, stream


@contextlib.contextmanager
def _ffmpeg_errors(path: PathLike) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError(
            path,
            f"it cannot be decoded (truncated or damaged): {error.strerror or error}",
            "copy or download it again, or remove it and its annotations",
        ) from error


@contextlib.contextmanager
def _pillow_errors(path: PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(
            path,
            f"it cannot be decoded (truncated or damaged): {error}",
            "copy or download it again, or remove it and its annotations",
        ) from error


def _check_file(path: PathLike) -> None:
    file = pathlib.Path(path)
    if not file.exists():
        raise VideoError(path, "the file does not exist", "correct the path or remove its records")
    if not file.is_file():
        raise VideoError(path, "it is not a file", "name the media file itself")
    if file.stat().st_size == 0:
        raise VideoError(path, "the file is empty (0 bytes)", "copy or download it again")


def _truncated(path: PathLike, detail: str) -> VideoError:
    return VideoError(
        path, f"it is truncated: {detail}", "copy or download it again, or remove its records"
    )


def _no_frames(path: PathLike) -> VideoError:
    return VideoError(path, "it has no frame", "copy or download it again, or remove its records")


def _origin(stream: av.VideoStream) -> float | None:
    return None if stream.start_time is None else float(stream.start_time * stream.time_base)


def _check_frame_count(
    path: PathLike,
    container: InputContainer,
    stream: av.VideoStream,
    packets: int,
    duration: float,
) -> None:
    """Compares with the header. MP4 counts exactly; AVI also counts frames that were left out.

    These are a few, or most of them where the recorder saw no change. Then the others last until
    the end of the count, `duration` in seconds; AVI's unit of time is a frame.
    """
    missing = stream.frames - packets
    if missing <= (0 if "mp4" in container.format.name else 1 + stream.frames // 32):
        return
    if container.format.name == "avi" and duration > (stream.frames - 0.5) * stream.time_base:
        return
    raise _truncated(path, f"it has {packets} of {stream.frames} stated frames")


def _stated_duration(container: InputContainer, stream: av.VideoStream) -> float | None:
    """The duration that the header promises for the video stream, in seconds."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska: "00:00:16.000000000"
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _shown_for(frame: av.VideoFrame, stream: av.VideoStream, gap: float) -> float:
    """How long a frame stays on screen: as stated, else as long as the one before it."""
    if frame.duration:
        return float(frame.duration * frame.time_base)
    if math.isfinite(gap):
        return gap
    return 1 / float(stream.average_rate or 25)


def _to_array(
    frame: av.VideoFrame, reformatter: VideoReformatter, size: tuple[int, int] | None
) -> np.ndarray:
    rotation = frame.rotation % 360
    height, width = size or (
        (frame.width, frame.height) if rotation in (90, 270) else (frame.height, frame.width)
    )
    if rotation in (90, 270):
        height, width = width, height
    picture = reformatter.reformat(
        frame, width, height, format="rgb24", interpolation=Interpolation.AREA
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, rotation // 90))


@contextlib.contextmanager
def _open_image(path: PathLike) -> Iterator[Image.Image]:
    _check_file(path)
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(
            path, f"it is not a readable image: {error}", "copy it again, or remove its records"
        ) from error
    with image:
        if not hasattr(image, "is_animated"):  # only formats that can be have it
            image.is_animated = False
        yield image


def _probe_image(path: PathLike) -> Probe:
    kind = media_kind(path)
    with _open_image(path) as image:
        orientation = image.getexif().get(0x0112, 1)
        width, height = image.size if orientation < 5 else image.size[::-1]
        frames = image.n_frames if kind == "video" else 1
        return Probe(kind, width, height, 0.0, frames, 0.0, 0, (image.format or "").lower())


def _image_to_array(path: PathLike, size: tuple[int, int] | None) -> np.ndarray:
    with _open_image(path) as image, _pillow_errors(path):
        upright = ImageOps.exif_transpose(image)
        return _flatten(upright.convert("RGBA"), size)


def _flatten(picture: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """uint8[h, w, 3] of an RGBA picture on white."""
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    if size and size != (flat.height, flat.width):
        flat = flat.resize((size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(flat)
