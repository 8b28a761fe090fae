"""Small media files that tests make themselves."""

import pathlib
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

RED, GREY = (220, 20, 20), (40, 40, 40)


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8[h, w, 3]: grey with a red top left quarter."""
    frame = np.full((height, width, 3), GREY, np.uint8)
    frame[: height // 2, : width // 2] = RED
    return frame


def write_video(
    path: pathlib.Path,
    times: Sequence[float],
    options: dict[str, str] | None = None,
    codec: str = "libx264",
) -> pathlib.Path:
    """A 64x48 video with frames at `times`; frame i is the picture with brightness i added."""
    milliseconds = Fraction(1, 1000)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = milliseconds
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture() + np.uint8(i % 32), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), milliseconds
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_header(path: pathlib.Path) -> pathlib.Path:
    """An mp4 that begins as a video does and has no frame: a recording that was never fed."""
    fragments = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
    data = write_video(path, steady(1), fragments).read_bytes()
    path.write_bytes(data[: data.index(b"moof") - 4])
    return path


def steady(seconds: float = 4.0, fps: float = 8.0) -> list[float]:
    return [i / fps for i in range(round(seconds * fps))]


def rotate_clockwise(path: pathlib.Path) -> None:
    """Writes the display matrix of an upright phone into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8  # past version, times, layer and volume
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_image(path: pathlib.Path, height: int = 20, width: int = 40) -> pathlib.Path:
    Image.fromarray(picture(height, width)).save(path)
    return path


def write_pictures(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """A folder of 64x48 pictures; picture i has brightness i added."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(picture() + np.uint8(i)).save(folder / name)
    return folder


def write_media(folder: pathlib.Path) -> pathlib.Path:
    """The media that tests/data/samples are about: two 4-second videos and an image."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / "clip_a.mp4", steady())
    write_video(folder / "clip_b.mp4", steady())
    write_image(folder / "still.png")
    return folder


def write_published_media(folder: pathlib.Path) -> pathlib.Path:
    """`write_media`, an image of Visual Genome, and videos as folders of pictures."""
    write_media(folder)
    write_image(folder / "1.png")
    write_pictures(folder / "strip", [f"{i:05d}.png" for i in range(3)])
    write_pictures(folder / "fifth", [f"{5 * i:05d}.png" for i in range(3)])
    write_pictures(folder / "shape-1" / "img", [f"{i:08d}.png" for i in range(1, 5)])
    return folder
