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

# Pixels; frames that are larger are shrunk to it before the model's own preprocessing, which is
# published for the frames of the file. Full HD is not; 512 shown frames of it are 3.2 GB.
LONG_SIDE = 1920
KEYS = (
    "video", "prompt", "id", "box", "box_time", "points", "point_time", "time", "start", "end",
)  # fmt: skip


class RequestError(UserError):
    """A question that cannot be asked: where, which field, what was expected."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      id: name of the outputs.
      video: video or image file.
      prompt: question; each "<box>" in it stands for one of `boxes`, in order.
      boxes: normalised [x1, y1, x2, y2] each.
      box_times: for each box, seconds of the frame that it is drawn on; None: the first shown.
      points: normalised (x, y, label) each; 1 on the thing that is meant, 0 not on it.
      point_time: seconds of the frame that they are on; None: the first shown.
      time: seconds of the frame that a box in the answer is for, or None.
      start, end: part of the video in seconds; end None is its end.
    """

    id: str
    video: pathlib.Path
    prompt: str
    boxes: tuple[tuple[float, ...], ...] = ()
    box_times: tuple[float | None, ...] = ()
    points: tuple[tuple[float, float, int], ...] = ()
    point_time: float | None = None
    time: float | None = None
    start: float = 0.0
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file with the interface of a prepared data set of one video.

    Every frame of the part that is asked about can be chosen, by its own time, so that a sampler
    finds the frames that it would find in the file. The first pass over the file reads times alone;
    pixels are made of the frames that are chosen, and kept.

    Attributes:
      path: the file.
      probe: what its header says.
      media: "video" or "image".
      start, end: seconds, the part of it; end may be infinite.
      times: float64[n] seconds of its frames that are on screen in [start, end), rising.
      duration: seconds of the whole file.
      size: (height, width) that frames are read at.
      kept: {number among `times`: uint8[height, width, 3]}, filled as frames are asked for.
    """

    path: pathlib.Path
    probe: video.Probe
    media: str
    start: float
    end: float
    times: np.ndarray
    duration: float
    size: tuple[int, int]
    kept: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    features: tuple[ClipFeaturesConfig, np.ndarray] | None = None
    texts: Asked | None = None

    @classmethod
    def read(
        cls, request: Request, features: FeatureStore | None = None,
        kinds: Collection[str] = ("clip_features",), *, whole_images: bool = False,
    ) -> Clip:
        """Reads the times of all frames; frames will be at most LONG_SIDE pixels wide and high.

        Args:
          features: where the features of the file and of the prompt are; None: they are not read.
          kinds: which of them are, "clip_features" and "text_features".
          whole_images: whether images are read at their own size, for a model that tiles them.
        """
        probe = video.probe(request.video)
        whole = whole_images and probe.media == "image"
        scale = 1.0 if whole else min(1.0, LONG_SIDE / max(probe.height, probe.width))
        size = (round(probe.height * scale), round(probe.width * scale))
        end = request.end if request.end is not None else float("inf")
        last = min(end, probe.duration)
        drawn = [("box_time", time) for time in request.box_times]
        for field, time in (*drawn, ("point_time", request.point_time)):
            if probe.duration and time is not None and not request.start <= time <= last:
                raise RequestError(
                    f"{field}: {time}, expected seconds of the clip, from {request.start:g} to "
                    f"{last:g}: the frame that it is drawn on")
        decoder = video.Decoder(request.video, None, request.start, end, size)
        times = np.array([time for time, _ in decoder.lazily()])
        clip = cls(request.video, probe, decoder.media, request.start, end, times,
                   decoder.duration, size)
        if features is None or clip.media == "image":
            return clip
        given: dict[str, Any] = {}
        if "clip_features" in kinds:
            values = features.read(features.file_of(request.video), clip.duration)
            given["features"] = (features.about, values)
        if "text_features" in kinds:
            states = features.read_text(request.prompt)
            given["texts"] = Asked(features.text, request.prompt, states)
        return dataclasses.replace(clip, **given)

    def video_info(self, video_id: str) -> VideoInfo:
        return VideoInfo(self.media, self.duration, len(self.times),
                         self.times.astype(np.float32), *self.size)

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """uint8[n, h, w, 3] of the n `indices` int[n] among `times`; no others are made."""
        missing = sorted(set(map(int, indices)) - self.kept.keys())
        if missing:
            read = video.read_video(self.path, None, self.start, self.end, self.size, missing)
            self.kept.update(zip(missing, read.frames, strict=True))
        return np.stack([self.kept[index] for index in map(int, indices)])

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
    for key in ("time", "point_time", "start", "end"):
        _check_seconds(f"{where}: {key}", entry.get(key))
    boxes, box_times = _boxes(where, entry)
    points = _points(where, entry, len(boxes))
    file = epath.Path(entry["video"])
    # From Python 3.13 on, a bucket joined with an absolute path is that path in the bucket.
    file = file if file.is_absolute() else epath.Path(folder) / file
    if files.is_remote(file):
        raise RequestError(f"{where}: video: {entry['video']!r}, expected a local file; copy it "
                           "here, or mount the bucket")
    return Request(entry["id"], pathlib.Path(file), entry["prompt"], boxes, box_times, points,
                   entry.get("point_time"), entry.get("time"), float(entry.get("start") or 0.0),
                   entry.get("end"))


def _check_seconds(field: str, value: Any) -> None:
    if value is not None and not (_is_number(value) and 0 <= value < 1e9):
        raise RequestError(f"{field}: {value!r}, expected seconds, 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _boxes(where: str, entry: dict[str, Any]
           ) -> tuple[tuple[tuple[float, ...], ...], tuple[float | None, ...]]:  # fmt: skip
    """The boxes of a request, one or a list of them, and the time of each."""
    given, times = entry.get("box"), entry.get("box_time")
    if given is None:
        given = []
    several = isinstance(given, list | tuple) and any(isinstance(v, list | tuple) for v in given)
    boxes = list(given) if several or given == [] else [given]
    for box in boxes:
        numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_number, box))
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise RequestError(f"{where}: box: {box!r}, expected normalised x1, y1, x2, y2 with "
                               "0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    if not boxes and times not in (None, []):
        raise RequestError(f"{where}: box_time: {times!r} without a box; give the box that is "
                           "drawn then, or remove it")
    times = list(times) if isinstance(times, list | tuple) else [times] * len(boxes)
    for time in times:
        _check_seconds(f"{where}: box_time", time)
    if times and len(times) != len(boxes):
        raise RequestError(f"{where}: box_time: {len(times)} times for {len(boxes)} boxes; give "
                           "one for each (null: the first frame shown), or one for all")
    marks = entry["prompt"].count("<box>")
    if marks != len(boxes):
        raise RequestError(
            f"{where}: prompt: {marks} places <box> for {len(boxes)} box; write <box> where the "
            "box belongs, as in 'Where does the circle at <box> go?'")
    return tuple(map(tuple, boxes)), tuple(times or [None] * len(boxes))


def _points(where: str, entry: dict[str, Any], boxes: int) -> tuple[tuple[float, float, int], ...]:
    """The points of a request, all about one thing: [x, y] on it, [x, y, 0] not on it."""
    given, time = entry.get("points"), entry.get("point_time")
    if given is not None and not (isinstance(given, list | tuple) and given):
        raise RequestError(f"{where}: points: {given!r}, expected a list of [x, y] or [x, y, 0]")
    points = []
    for i, point in enumerate(given or ()):
        numbers = isinstance(point, list | tuple) and all(map(_is_number, point))
        if not numbers or len(point) not in (2, 3) or (*point, 1)[2] not in (0, 1):
            raise RequestError(f"{where}: points[{i}]: {point!r}, expected x and y, and as a third "
                               "1 (on the thing that is meant) or 0 (not on it)")
        if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1):
            raise RequestError(f"{where}: points[{i}]: {point!r} is outside the frame, expected x "
                               "and y from 0 to 1; divide pixels by its width and height")
        points.append((float(point[0]), float(point[1]), int((*point, 1)[2])))
    if points and not any(label for *_, label in points) and not boxes:
        raise RequestError(f"{where}: points: {given!r}: none is on the thing that is meant; give "
                           "one that is, or a box")
    if time is not None and (not points or boxes):
        reason = "box_time is that of both" if points else "there are no points"
        raise RequestError(f"{where}: point_time: {time!r}: {reason}; remove it")
    return tuple(points)


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
