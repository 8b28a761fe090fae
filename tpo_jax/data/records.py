"""What prepared data is: clips of frames, examples about them, and random access to both.

A prepared folder, local or gs://, holds one split:

    clips/1.0.0/          TFDS table, one record per clip (at most 32 frames of one video)
    examples/1.0.0/       TFDS table, one record per example, sorted by video
    clip_features/1.0.0/  TFDS table, one record per video, where `prepare run` got --features
    text_features/1.0.0/  TFDS table, one record per question, where those have text features
    index.jsonl           one line per video: duration, frame times, its rows in the tables
    prepared.json         format version and the settings the frames were stored with
    statistics.json       counts by task, kind and source
    quarantine.jsonl      every input that was left out, and why

Times are seconds from the first frame of the video. Boxes are [x1, y1, x2, y2] in [0, 1].
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tpo_jax.data import tables
from tpo_jax.data.text_features import Texts
from tpo_jax.errors import UserError
from tpo_jax.models.config import ClipFeaturesConfig, TextFeaturesConfig
from tpo_jax.models.heads import task_tokens

FORMAT_VERSION = 1
CLIP_FRAMES = 32
MEDIA = ("video", "image")
TASKS = ("conversation", "temporal", "region", "mask", "tracking", "action", "preference")
MARKERS = ("<region>", "<temporal>", "<mask>", "<box>")


class RecordError(UserError):
    """A record or a prepared folder that cannot be used; the message says what and how to fix."""


def known_tasks() -> tuple[str, ...]:
    """TASKS, and those that registered heads bring."""
    return tuple(dict.fromkeys((*TASKS, *task_tokens())))


def task_number(task: str) -> int:
    """1 + the task's place in `known_tasks`, what stands for it in a batch; 0 is no task.

    Raises:
      RecordError: no such task.
    """
    if task not in known_tasks():
        raise RecordError(
            f"task {task!r} is unknown, expected one of {', '.join(known_tasks())}; import the "
            "head that brings it, or leave the example out"
        )
    return 1 + known_tasks().index(task)


@dataclasses.dataclass(frozen=True)
class Clip:
    """At most 32 consecutive stored frames of one video (or the single frame of an image).

    `timestamps` is float32[n] in seconds, `frames` is uint8[n, h, w, 3].
    """

    clip_id: str
    video_id: str
    media: str
    chunk: int
    timestamps: np.ndarray
    frames: np.ndarray
    encoding: str

    def to_record(self) -> bytes:
        """A record of the clips table; frames as raw bytes or as one JPEG each."""
        raw = self.encoding == "raw"
        return tables.serialize(
            {
                "clip_id": self.clip_id,
                "video_id": self.video_id,
                "media": self.media,
                "encoding": self.encoding,
                "chunk": self.chunk,
                "timestamps": np.asarray(self.timestamps, np.float32),
                "frames": self.frames if raw else [tables.encode_jpeg(f) for f in self.frames],
            }
        )

    @classmethod
    def from_record(cls, record: bytes) -> Clip:
        """Inverse of `to_record` (exact for raw)."""
        row = tables.Row(record)
        timestamps = row.floats("timestamps")
        return cls(
            row.text("clip_id"),
            row.text("video_id"),
            row.text("media"),
            row.integer("chunk"),
            timestamps,
            _decode_frames(row, np.arange(len(timestamps))),
            row.text("encoding"),
        )


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer. `options` is empty for an open question."""

    question: str
    answer: str
    options: tuple[str, ...] = ()
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """Supervision for one video: turns with slot markers and the targets behind the markers.

    `start` and `end` bound the part of the video that the example is about. A reader that does
    not know the duration leaves `end` infinite; preparation replaces it by the duration.
    """

    example_id: str
    video_id: str
    media: str
    task: str
    source: str
    start: float
    end: float
    turns: tuple[Turn, ...]
    targets: Mapping[str, Any]

    @property
    def labelled(self) -> bool:
        """False of a split whose labels are not published: to be answered, not scored or learnt."""
        return not self.targets.get("unlabelled")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back equal."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["turns"] = [
            {
                "question": turn.question,
                "answer": turn.answer,
                "options": list(turn.options),
                "kind": turn.kind,
            }
            for turn in self.turns
        ]
        fields["targets"] = dict(self.targets)
        return {"format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Example:
        """Reads `to_json` output; raises RecordError on another version or other keys."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise RecordError(
                f"example {data.get('example_id')!r}: format_version is {version!r}, expected "
                f"{FORMAT_VERSION}; prepare the data again with this version of tpo_jax"
            )
        names = {f.name for f in dataclasses.fields(cls)}
        if names != set(data) - {"format_version"}:
            raise RecordError(
                f"example {data.get('example_id')!r}: keys are {sorted(data)}, expected "
                f"format_version and {sorted(names)}"
            )
        turns = tuple(
            Turn(t["question"], t["answer"], tuple(t["options"]), t["kind"]) for t in data["turns"]
        )
        return cls(**{name: data[name] for name in names - {"turns"}}, turns=turns)

    def to_record(self, timestamps: np.ndarray) -> bytes:
        """A record of the examples table; `timestamps` float32[n] are those of its video.

        The `json` column is the whole example; the others, among them the ids of the clips that
        [start, end] touches, are for people who browse the table.
        """
        ends = np.searchsorted(timestamps, (self.start, self.end), side="right") - 1
        first, last = np.maximum(ends, 0) // CLIP_FRAMES
        columns = ("example_id", "video_id", "media", "task", "source")
        return tables.serialize(
            {name: getattr(self, name) for name in columns}
            | {
                "questions": [turn.question for turn in self.turns],
                "answers": [turn.answer for turn in self.turns],
                "clip_ids": [f"{self.video_id}#{chunk}" for chunk in range(first, last + 1)],
                "json": json.dumps(self.to_json()),
            }
        )

    @classmethod
    def from_record(cls, record: bytes) -> Example:
        return cls.from_json(json.loads(tables.Row(record).text("json")))


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What is known of a prepared video without reading its frames.

    `timestamps` is float32[num_frames], the true times of the stored frames in seconds; `height`
    and `width` are those of the stored frames, in pixels, and `encoding` is theirs. An image has
    duration 0 and one frame.
    """

    media: str
    duration: float
    num_frames: int
    timestamps: np.ndarray
    height: int
    width: int
    encoding: str = "raw"

    @property
    def stored(self) -> str:
        """What was done to the pixels before they were stored, such as "336 x 336 jpeg"."""
        return f"{self.height} x {self.width} {self.encoding}"


@dataclasses.dataclass(frozen=True)
class IndexEntry:
    """One line of index.jsonl: a video, its first row and row count in both tables, its row in the
    table of clip features, and its first row and the names of its questions in that of text
    features, if it has any."""

    video_id: str
    info: VideoInfo
    clips: tuple[int, int]
    examples: tuple[int, int]
    clip_features: int | None = None
    text_features: tuple[int, tuple[str, ...]] | None = None

    def to_json(self) -> dict[str, Any]:
        given = {
            "clip_features": self.clip_features,
            "text_features": self.text_features and [self.text_features[0],
                                                     list(self.text_features[1])],
        }  # fmt: skip
        return {
            "video_id": self.video_id,
            "media": self.info.media,
            "duration": self.info.duration,
            "height": self.info.height,
            "width": self.info.width,
            "timestamps": [round(float(t), 6) for t in self.info.timestamps],
            "clips": list(self.clips),
            "examples": list(self.examples),
        } | {kind: value for kind, value in given.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], encoding: str) -> IndexEntry:
        """The line `data` of a folder that stores frames in `encoding`."""
        timestamps = np.asarray(data["timestamps"], np.float32)
        info = VideoInfo(
            data["media"],
            data["duration"],
            len(timestamps),
            timestamps,
            data["height"],
            data["width"],
            encoding,
        )
        texts = data.get("text_features")
        rows = tuple(data["clips"]), tuple(data["examples"]), data.get("clip_features")
        return cls(data["video_id"], info, *rows, texts and (texts[0], tuple(texts[1])))


class PreparedDataset:
    """Random access to one prepared folder; thread-safe, and picklable by path.

    Args:
      path: a prepared folder, or the folder that holds prepared folders.
      split: the sub-folder to read ("train"); None when `path` itself is the prepared folder.

    Raises:
      RecordError: the folder is missing, unfinished or of another format version.
    """

    def __init__(self, path: str | os.PathLike[str], split: str | None = None):
        self._arguments = (os.fspath(path), split)
        self.path = epath.Path(path) / split if split else epath.Path(path)
        self.settings = read_settings(self.path)
        entries = [
            IndexEntry.from_json(json.loads(line), self.settings["encoding"])
            for line in (self.path / "index.jsonl").read_text("utf-8").splitlines()
        ]
        self._entries = {entry.video_id: entry for entry in entries}
        self._clips = tables.open_table(self.path / "clips")
        self._examples = tables.open_table(self.path / "examples")
        self.clip_features_config = prepared_features(self.settings, "clip_features")
        if self.clip_features_config is not None:
            self._features = tables.open_table(self.path / "clip_features")
        self.texts = self._open_texts()

    def __reduce__(self):
        return PreparedDataset, self._arguments

    def _open_texts(self) -> Texts | None:
        """The text features of its questions, if it has any."""
        about = prepared_features(self.settings, "text_features")
        if about is None:
            return None
        entries = self._entries.values()
        places = {e.video_id: e.text_features for e in entries if e.text_features is not None}
        return Texts(about, tables.open_table(self.path / "text_features"), places)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def videos(self) -> list[str]:
        """Video ids, in the order of the tables."""
        return list(self._entries)

    @property
    def kinds(self) -> list[str]:
        """Kinds of its questions."""
        return list(json.loads((self.path / "statistics.json").read_text("utf-8"))["kinds"])

    def video_info(self, video_id: str) -> VideoInfo:
        return self.entry(video_id).info

    def examples(self, video_id: str) -> list[Example]:
        """All examples about one video."""
        first, count = self.entry(video_id).examples
        return [Example.from_record(self._examples[first + i]) for i in range(count)]

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """Frames by index into `video_info(video_id).timestamps`, repeats allowed.

        Args:
          video_id: one of `videos`.
          indices: int[F].

        Returns:
          uint8[F, h, w, 3]; only the clips that hold the indices are read.
        """
        entry = self.entry(video_id)
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < entry.info.num_frames:
            raise IndexError(
                f"{video_id}: frame indices {indices.min()}..{indices.max()}, but the video has "
                f"{entry.info.num_frames} stored frames"
            )
        chunks = indices // CLIP_FRAMES
        wanted = np.unique(chunks)
        if len(wanted) == 1:  # the usual case, without a second copy
            return self._read(entry, wanted[0], indices)
        frames = np.empty((len(indices), entry.info.height, entry.info.width, 3), np.uint8)
        for chunk in wanted:
            here = chunks == chunk
            frames[here] = self._read(entry, chunk, indices[here])
        return frames

    def clip_features(self, video_id: str) -> np.ndarray:
        """float32[N, width] of a video, where the folder has `clip_features_config`."""
        record = self._features[self.entry(video_id).clip_features]
        return tables.Row(record).array("features", np.float32)

    def _read(self, entry: IndexEntry, chunk: int, indices: np.ndarray) -> np.ndarray:
        """uint8[F, h, w, 3] of indices that all lie in one chunk."""
        row = tables.Row(self._clips[entry.clips[0] + int(chunk)])
        return _decode_frames(row, indices - chunk * CLIP_FRAMES)

    def entry(self, video_id: str) -> IndexEntry:
        """The line of index.jsonl; raises KeyError for an unknown video."""
        if video_id not in self._entries:
            raise KeyError(f"{self.path} has no video {video_id!r}; see its index.jsonl")
        return self._entries[video_id]


def _decode_frames(row: tables.Row, indices: np.ndarray) -> np.ndarray:
    """uint8[F, h, w, 3] of a clip record, a new array; only the JPEGs asked for are decoded."""
    if row.text("encoding") == "raw":
        return row.array("frames")[indices]
    pictures, asked = row.pictures("frames"), indices.tolist()
    decoded = {i: tables.decode_jpeg(pictures[i]) for i in set(asked)}
    return np.stack([decoded[i] for i in asked])


def read_settings(path: epath.Path) -> dict[str, Any]:
    """What prepared.json says; RecordError for a folder that is none, or of another version."""
    marker = path / "prepared.json"
    if not marker.exists():
        raise RecordError(
            f"{path} is not a prepared folder (it has no prepared.json); make it with "
            "`python -m tpo_jax.prepare run`"
        )
    settings = json.loads(marker.read_text("utf-8"))
    if settings["format_version"] != FORMAT_VERSION:
        raise RecordError(
            f"{marker}: format_version is {settings['format_version']}, expected {FORMAT_VERSION};"
            " prepare the data again with this version of tpo_jax"
        )
    return settings


def prepared_features(settings: Mapping[str, Any], kind: str) -> Any:
    """What a folder has of "clip_features" or "text_features", of its settings; None: none."""
    about = settings.get(kind)
    made = {"clip_features": ClipFeaturesConfig, "text_features": TextFeaturesConfig}[kind]
    return None if about is None else made(**about)
