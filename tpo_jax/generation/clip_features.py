"""Clip features of videos by the video encoder of a model folder, into a folder that heads read.

A clip is `clip_seconds` of a video, shown to the encoder by itself as a few frames at even times.
Its features are the mean over frames and patches, scaled to length 1 as the published features are.
The encoder's name in features.json is a hash of all that changes them, so that a head that was
trained with one encoder is never given features of another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.ingest.plan import MediaItem
from tpo_jax.data.preprocess import resize_of
from tpo_jax.data.video import TICK_TOLERANCE, Decoder, VideoError
from tpo_jax.errors import UserError
from tpo_jax.interop.folder import load_config, open_leaves
from tpo_jax.models.config import ClipFeaturesConfig, ModelConfig
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.hashes import hash_json, hash_weights
from tpo_jax.parallel.paths import flatten, unflatten

CLIP_SECONDS = 2.0  # that of QVHighlights
FRAMES = 4  # of a clip, where the encoder leaves the choice
BATCH_SIZE = 16  # clips at a time


class Extractor:
    """The video encoder of a model, ready to read clips.

    Args:
      config: of the model.
      vision: parameters below "vision/", a nested dict; no others are needed.
      clip_seconds: length of a clip.
      frames: of a clip; 0: as many as the encoder's positions in time were trained for, or FRAMES.
      batch_size: clips at a time.

    Raises:
      ValueError: the encoder does not take so many frames, or a clip has no length.
    """

    def __init__(
        self,
        config: ModelConfig,
        vision: Mapping[str, Any],
        *,
        clip_seconds: float = CLIP_SECONDS,
        frames: int = 0,
        batch_size: int = BATCH_SIZE,
    ):
        given = config.vision.frames if isinstance(config.vision, TowerConfig) else 0
        most = config.vision.max_frames
        self.frames = frames or given or min(FRAMES, most)
        if not 1 <= self.frames <= most:
            raise UserError(f"--frames={frames}: expected 1 to {most}, which the encoder takes")
        if not clip_seconds > 0:
            raise UserError(f"--clip_seconds={clip_seconds:g}: expected more than 0")
        self.config, self.clip_seconds, self.batch_size = config, clip_seconds, batch_size
        name = encoder_name(config, vision, self.frames)
        self.about = ClipFeaturesConfig(config.vision.width, float(clip_seconds), name)
        self._model = FunctionalModel(
            dataclasses.replace(
                config, heads=(), tokens={}, clip_features=None, text_features=None
            )
        )
        self._vision = jax.tree.map(jnp.asarray, dict(vision))
        self._encode = jax.jit(self._encode_clips)

    @classmethod
    def from_folder(cls, model: epath.PathLike, **options: Any) -> Extractor:
        """The encoder of a model folder; the other parameters are not read."""
        config = load_config(model)
        leaves = {
            path.removeprefix("vision/"): np.asarray(leaf)
            for path, leaf in open_leaves(model).items()
            if path.startswith("vision/")
        }
        return cls(config, unflatten(leaves), **options)

    def _encode_clips(self, vision: Any, frames: jax.Array, valid: jax.Array) -> jax.Array:
        """uint8[B, n, size, size, 3], bool[B, n] -> float32[B, D] of length 1."""
        # Nothing that is kept depends on the other parameters: the compiler drops them.
        others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._model.abstract())
        model = self._model.bind(others | {"vision": vision})
        times = jnp.zeros(valid.shape, jnp.float32)
        patches = model.encode(frames, valid, times).features.patches.astype(jnp.float32)
        total = jnp.sum(jnp.mean(patches, axis=(2, 3)) * valid[..., None], axis=1)
        return total * jax.lax.rsqrt(jnp.sum(jnp.square(total), axis=-1, keepdims=True) + 1e-12)

    def features(self, item: MediaItem) -> np.ndarray:
        """float32[N, D] of one video; raises VideoError."""
        found, clips = [], self._clips(item)
        while batch := list(itertools.islice(clips, self.batch_size)):
            size = self.config.vision.image_size
            frames = np.zeros((self.batch_size, self.frames, size, size, 3), np.uint8)
            valid = np.zeros(frames.shape[:2], bool)
            for row, clip in enumerate(batch):
                frames[row, : len(clip)], valid[row, : len(clip)] = clip, True
            found.append(np.asarray(self._encode(self._vision, frames, valid))[: len(batch)])
        return np.concatenate(found)

    def _clips(self, item: MediaItem) -> Iterator[list[np.ndarray]]:
        """The frames of every clip of a video; the last may have fewer."""
        vision = self.config.vision
        size, resize = vision.image_size, resize_of(vision.resize, "video", vision.mean)
        decoder = Decoder(item.path, self.frames / self.clip_seconds, frame_rate=item.frame_rate)
        shown = on_screen(decoder, lambda frame: resize(frame[None], size)[0])
        while clip := list(itertools.islice(shown, self.frames)):
            yield clip


def on_screen(decoder: Decoder, resize: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """What is on screen at 0, 1 / fps, 2 / fps, ... of a video, whose own times may be uneven: what
    `resize` makes of a frame uint8[h, w, 3], such as uint8[size, size, 3]."""
    shown, tick = None, 0
    for time, frame in decoder:
        while shown is not None and tick / decoder.fps < time - TICK_TOLERANCE:
            yield shown
            tick += 1
        shown = resize(frame)
    while tick / decoder.fps < decoder.duration - TICK_TOLERANCE:
        yield shown
        tick += 1


def encoder_name(config: ModelConfig, vision: Mapping[str, Any], frames: int) -> str:
    """What tells these features from those of any other weights or settings."""
    running = ("remat", "unroll", "max_frames")  # change speed, or what is refused
    sizes = {k: v for k, v in dataclasses.asdict(config.vision).items() if k not in running}
    described = {
        "vision": sizes,
        "resize": config.vision.resize,
        "dtype": config.dtype,
        "frames": frames,
        "pooling": "mean of frames and patches, of length 1",
    }
    if any(path.endswith("/lora_a") for path in flatten(vision)):
        described["lora"] = config.lora.scale
    digest = hash_json(described | {"weights": hash_weights(vision)})
    return f"tpo_jax vision {digest[:16]}, {frames} frames a clip"


def extract(
    extractor: Extractor, items: Sequence[MediaItem], store: FeatureStore, progress: bool = True
) -> list[VideoError]:
    """Writes the features of every video that has none yet; returns what could not be read.

    A video that was written stays as it is, so that a run that was stopped goes on where it was.
    """
    todo = [item for item in items if not store.file(item.video_id).exists()]
    failed = []
    for item in tqdm.tqdm(
        todo,
        desc="features",
        unit="video",
        total=len(items),
        initial=len(items) - len(todo),
        disable=not progress,
    ):
        try:
            store.write(item.video_id, extractor.features(item))
        except VideoError as error:
            failed.append(error)
    return failed
