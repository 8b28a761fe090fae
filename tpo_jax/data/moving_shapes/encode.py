"""Frames to files in memory: H.264 in mp4, and PNG."""

from __future__ import annotations

import fractions
import io

import av
import numpy as np
from PIL import Image

from tpo_jax.data.moving_shapes.world import WorldConfig


def encode_mp4(frames: np.ndarray, config: WorldConfig) -> bytes:
    """H.264 in mp4 (yuv420p, constant rate) of uint8[F, H, W, 3]; equal input gives equal bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=config.fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        # One thread: workers already fill the cores, and the result must not depend on them.
        stream.options = {
            "crf": str(config.crf),
            "preset": "superfast",
            "g": str(config.gop),
            "bf": "0",
            "threads": "1",
        }
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, fractions.Fraction(1, config.fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_png(frame: np.ndarray) -> bytes:
    """A PNG of uint8[H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()
