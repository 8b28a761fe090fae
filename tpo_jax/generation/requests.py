"""Questions from outside: checked requests, and the files that they are about."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpo_jax.data import files, video
from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.records import VideoInfo
from tpo_jax.data.text import TextCodec, TextError
from tpo_jax.data.text_features import Asked
from tpo_jax.errors import UserError
from tpo_jax.models.config import ClipFeaturesConfig

LONG_SIDE = 512  # pixels; larger frames are read at this size
OVERSAMPLING = 4  # frames read per frame shown, so that sampling finds the right times
KEYS = ("video", "prompt", "id", "box", "box_time", "time", "start", "end")


class RequestError(UserError):
    """A question that cannot be asked: where, which field, what was expected."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      id: name of the outputs.
      video: video or image file.
      prompt: question; "<box>" in it stands for `box`.
      box: normalised [x1, y1, x2, y2], or None.
      box_time: seconds of the frame that `box` is drawn on; None: the first that is shown.
      time: seconds of the frame that a box in the answer is for, or None.
      start, end: part of the video in seconds; end None is its end.
    """

    id: str
    video: pathlib.Path
    prompt: str
    box: tuple[float, ...] | None = None
    box_time: float | None = None
    time: float | None = None
    start: float = 0.0
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file as it was read, with the interface of a prepared data set of one video."""

    path: pathlib.Path
    probe: video.Probe
    frames_read: video.Video
    features: tuple[ClipFeaturesConfig, np.ndarray] | None = None
    texts: Asked | None = None

    @classmethod
    def read(
        cls, request: Request, frames: int, features: FeatureStore | None = None,
        kinds: Collection[str] = ("clip_features",),
    ) -> Clip:
        """Reads about OVERSAMPLING * frames frames, at most LONG_SIDE pixels wide and high.

        Args:
          features: where the features of the file and of the prompt are; None: they are not read.
          kinds: which of them are, "clip_features" and "text_features".
        """
        probe = video.probe(request.video)
        scale = min(1.0, LONG_SIDE / max(probe.height, probe.width))
        size = (round(probe.height * scale), round(probe.width * scale))
        end = request.end if request.end is not None else float("inf")
        last = min(end, probe.duration)
        if probe.duration and not request.start <= (request.box_time or request.start) <= last:
            raise RequestError(
                f"box_time: {request.box_time}, expected seconds of the clip, from "
                f"{request.start:g} to {last:g}: the frame that the box is drawn on")
        length = last - request.start
        fps = OVERSAMPLING * frames / length if probe.duration and length > 0 else None
        read = video.read_video(request.video, fps, request.start, end, size)
        clip = cls(request.video, probe, read)
        if features is None or read.media == "image":
            return clip
        given: dict[str, Any] = {}
        if "clip_features" in kinds:
            values = features.read(features.file_of(request.video), read.duration)
            given["features"] = (features.about, values)
        if "text_features" in kinds:
            states = features.read_text(request.prompt)
            given["texts"] = Asked(features.text, request.prompt, states)
        return dataclasses.replace(clip, **given)

    @property
    def media(self) -> str:
        return self.frames_read.media

    def video_info(self, video_id: str) -> VideoInfo:
        read = self.frames_read
        return VideoInfo(read.media, read.duration, len(read.frames), read.timestamps,
                         *read.frames.shape[1:3])

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """uint8[n, h, w, 3] of the n `indices` int[n] among the frames that were read."""
        return self.frames_read.frames[indices]

    @property
    def clip_features_config(self) -> ClipFeaturesConfig | None:
        return self.features and self.features[0]

    def clip_features(self, video_id: str) -> np.ndarray:
        """float32[n, width] of the whole video, in the order of its clips."""
        return self.features[1]


def read_list(path: epath.Path) -> list[Request]:
    """The requests of a JSONL file; RequestError names line and field."""
    requests: dict[str, Request] = {}
    for number, line in enumerate(files.read_text(path, "--input").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{where}: not JSON ({error})") from error
        if not isinstance(entry, dict) or set(entry) - set(KEYS):
            raise RequestError(f"{where}: expected an object with some of {', '.join(KEYS)}, got "
                               f"{line[:200]}")
        entry.setdefault("id", f"{number:05d}")
        request = make_request(where, entry, path.parent)
        if request.id in requests:
            raise RequestError(f"{where}: id {request.id!r} occurs twice; make ids unique")
        requests[request.id] = request
    if not requests:
        raise RequestError(f"{path}: no lines; write one {{\"video\", \"prompt\"}} a line")
    return list(requests.values())


def make_request(where: str, entry: dict[str, Any], folder: epath.PathLike) -> Request:
    """Checks the fields of one request."""
    for key in ("id", "video", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise RequestError(f"{where}: {key}: {entry.get(key)!r}, expected text")
    if not re.fullmatch(r"[\w.-]+", entry["id"]):
        raise RequestError(f"{where}: id: {entry['id']!r}, expected letters, digits and '_.-': it "
                           "names a file")
    for key in ("time", "box_time", "start", "end"):
        value = entry.get(key)
        if value is not None and (not isinstance(value, int | float) or not 0 <= value < 1e9):
            raise RequestError(f"{where}: {key}: {value!r}, expected seconds, 0 or more")
    box = entry.get("box")
    if box is not None:
        box = tuple(box) if isinstance(box, list | tuple) else (box,)
        numbers = len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise RequestError(f"{where}: box: {entry['box']!r}, expected normalised x1, y1, x2, "
                               "y2 with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    if box is None and entry.get("box_time") is not None:
        raise RequestError(f"{where}: box_time: {entry['box_time']!r} without a box; give the box "
                           "that is drawn then, or remove it")
    marks = entry["prompt"].count("<box>")
    if marks != (box is not None):
        raise RequestError(
            f"{where}: prompt: {marks} places <box> for {int(box is not None)} box; write <box> "
            "where the box belongs, as in 'Where does the circle at <box> go?'")
    file = epath.Path(folder) / entry["video"]
    if files.is_remote(file) or files.is_remote(entry["video"]):
        raise RequestError(f"{where}: video: {entry['video']!r}, expected a local file; copy it "
                           "here, or mount the bucket")
    return Request(entry["id"], pathlib.Path(file), entry["prompt"], box, entry.get("box_time"),
                   entry.get("time"), float(entry.get("start") or 0.0), entry.get("end"))


def prompt_length(codec: TextCodec, requests: Sequence[Request]) -> int:
    """Tokens of the longest prompt, rounded up; RequestError for a prompt that cannot be read."""
    longest = 0
    for request in requests:
        try:
            branch = codec.build_branch(request.prompt, None, request.id)
        except TextError as error:
            raise RequestError(str(error)) from error
        longest = max(longest, len(branch.ids))
    return -(-longest // 16) * 16
