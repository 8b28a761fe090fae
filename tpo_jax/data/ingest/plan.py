"""What is to be done: annotations read and checked, media grouped into pieces of work.

A piece of work is named by a hash of everything that decides its result: settings, the media files
(size and modification time) and their examples. A finished piece is found again by its name, so a
run that was killed continues, and a changed file redoes its own piece only.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from tpo_jax.data import formats, tables
from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.files import is_remote
from tpo_jax.data.formats.reading import Context, Draft
from tpo_jax.data.media import STILL, MediaFolder
from tpo_jax.data.problems import Invalid, Problem
from tpo_jax.data.records import CLIP_FRAMES, FORMAT_VERSION
from tpo_jax.errors import UserError

# A piece is a shard of both tables. Many small ones spread over processes and lose little in a
# kill; but readers keep every shard open, so there are about PIECES, and more only for sets whose
# pieces would grow beyond LARGEST_PIECE.
PIECES = 64
PIECE_MEDIA = 64
SMALLEST_PIECE, LARGEST_PIECE = 4 * 2**20, 2**30  # bytes of media files


class PrepareError(UserError):
    """A preparation that cannot start or finish; the message says why and how to fix it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How frames are stored: ticks a second, size in pixels (None = native), raw or jpeg."""

    fps: float = 2.0
    size: int | None = None
    encoding: str = "raw"

    def __post_init__(self):
        if not self.fps > 0:
            raise PrepareError(f"fps: {self.fps}: expected a positive number of frames a second")
        if self.size is not None and not self.size > 0:
            raise PrepareError(f"size: {self.size}: expected pixels, or None for the native size")
        if self.encoding not in tables.ENCODINGS:
            raise PrepareError(f"encoding: {self.encoding!r}: expected one of {tables.ENCODINGS}")


@dataclasses.dataclass(frozen=True)
class Source:
    """One annotation file (or folder), its format and the folder of the media it names."""

    media: pathlib.Path
    format: str
    annotations: pathlib.Path
    name: str
    ignore_keys: frozenset[str] = frozenset()
    frame_rate: float | None = None  # of folders of pictures whose annotations do not say it
    unlabelled: bool = False  # whether the split is published without labels
    split: str | None = None  # which one is read where the annotations hold several


@dataclasses.dataclass(frozen=True)
class MediaItem:
    """One media file (or folder of pictures, `frame_rate` a second) and the examples about it."""

    path: pathlib.Path
    video_id: str
    drafts: tuple[Draft, ...]
    frame_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A unit of parallel and resumable work."""

    key: str
    items: tuple[MediaItem, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    settings: Settings
    pieces: tuple[Piece, ...]
    problems: tuple[Problem, ...]
    features: FeatureStore | None = None

    @property
    def fingerprint(self) -> str:
        """Names the result: equal for equal settings, media and annotations."""
        reports = [problem.to_json() for problem in self.problems]
        return _hash([[piece.key for piece in self.pieces], reports])

    @property
    def num_media(self) -> int:
        return sum(len(piece.items) for piece in self.pieces)


def make_plan(
    sources: Sequence[Source], settings: Settings, features: FeatureStore | None = None
) -> Plan:
    """Reads and checks all annotations and cuts the work into pieces, sorted by video.

    Args:
      features: clip features of the videos, to be kept beside their frames, and text features of
        their questions if it has any.

    Raises:
      PrepareError: a media folder is missing, nothing usable is left, or two videos would have the
        features of one file.
    """
    folders = _open_folders(sources)
    by_video: dict[tuple[str, pathlib.Path], list[Draft]] = collections.defaultdict(list)
    rates: dict[pathlib.Path, float | None] = {}
    problems: list[Problem] = []
    seen: dict[str, Draft] = {}
    for source in sources:
        folder = folders[source.media]
        drafts, bad = read_source(source, folder)
        problems += bad
        for draft in drafts:
            other = seen.setdefault(draft.example.example_id, draft)
            if other is not draft:
                problems.append(_duplicate(draft, other))
                continue
            name = draft.example.video_id
            video_id = name if len(folders) == 1 else f"{folder.root.name}/{name}"
            example = dataclasses.replace(draft.example, video_id=video_id)
            rates[folder.path(name)] = folder.frame_rate(name)
            by_video[video_id, folder.path(name)].append(
                dataclasses.replace(draft, example=example)
            )
    if not by_video:
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        count = f"{len(sources)} annotation file" + "s" * (len(sources) != 1)
        raise PrepareError(f"no usable record in {count}:{shown}")
    items = [
        MediaItem(path, video_id, tuple(drafts), rates[path])
        for (video_id, path), drafts in sorted(by_video.items())
    ]
    if features is not None:
        check_names(features, (item.video_id for item in items))
    pieces = tuple(Piece(_piece_key(group, settings, features), group) for group in _group(items))
    return Plan(settings, pieces, tuple(problems), features)


def check_names(features: FeatureStore, video_ids: Iterable[str]) -> None:
    """Raises PrepareError where two videos have one file of features."""
    owners: dict[epath.Path, str] = {}
    for video_id in video_ids:
        if video_id.lower().endswith(STILL):
            continue  # images have none
        other = owners.setdefault(features.file(video_id), video_id)
        if other != video_id:
            raise PrepareError(
                f"{features.file(video_id)} would be the features of {other} and of {video_id}; "
                "rename one of the videos"
            )


def read_source(source: Source, folder: MediaFolder | None) -> tuple[list[Draft], list[Problem]]:
    """The drafts of one annotation file and the problems in it.

    Raises:
      PrepareError: it is said to have no labels, and its format reads no such splits; or a split is
        named, and no file of its format holds several.
      splits.WrongSplit: the file holds several, and none of them is named.
    """
    if source.unlabelled and not formats.get(source.format).unlabelled:
        known = [name for name, form in formats.FORMATS.items() if form.unlabelled]
        raise PrepareError(
            f"unlabelled: the format {source.format} reads no splits without labels, "
            f"{', '.join(known)} do; leave it out"
        )
    if source.split is not None and formats.get(source.format).split is None:
        known = [name for name, form in formats.FORMATS.items() if form.split]
        raise PrepareError(
            f"split: {source.split!r}: files of the format {source.format} hold one split each, "
            f"those of {', '.join(known)} may hold several; leave it out"
        )
    context = Context(
        source.annotations, source.name, folder, source.ignore_keys, source.frame_rate,
        source.unlabelled, source.split,
    )  # fmt: skip
    return formats.get(source.format).read(context)


def _open_folders(sources: Sequence[Source]) -> dict[pathlib.Path, MediaFolder]:
    folders: dict[pathlib.Path, MediaFolder] = {}
    for source in sources:
        if source.media not in folders:
            try:
                folders[source.media] = MediaFolder(source.media)
            except FileNotFoundError as error:
                raise PrepareError(f"{error}; correct the path of {source.annotations}") from error
    names = [path.name for path in folders]
    if len(set(names)) != len(names):
        raise PrepareError(
            f"media folders {sorted(map(str, folders))} have the same name, so their videos cannot "
            "be told apart; rename one"
        )
    return folders


def _duplicate(draft: Draft, other: Draft) -> Problem:
    return Invalid(
        "example_id",
        draft.example.example_id,
        f"already used by {other.file} [{other.record}]",
        "give every record of a source an id of its own",
    ).at(draft.file, draft.record)


def _group(items: Sequence[MediaItem]) -> list[tuple[MediaItem, ...]]:
    """Consecutive media, cut by number and by bytes."""
    sizes = [_stat(item.path)[0] for item in items]
    most_media = max(PIECE_MEDIA, -(-len(items) // PIECES))
    most_bytes = min(max(SMALLEST_PIECE, -(-sum(sizes) // PIECES)), LARGEST_PIECE)
    groups: list[list[MediaItem]] = [[]]
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if groups[-1] and (len(groups[-1]) == most_media or filled + size > most_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return [tuple(group) for group in groups]


def _piece_key(
    items: Sequence[MediaItem], settings: Settings, features: FeatureStore | None
) -> str:
    described: list[Any] = [FORMAT_VERSION, CLIP_FRAMES, dataclasses.asdict(settings)]
    for item in items:
        examples = [[d.file, d.record, d.example.to_json()] for d in item.drafts]
        described.append([item.video_id, *_stat(item.path), examples])
        if item.frame_rate is not None:
            described.append(item.frame_rate)
        if features is not None:
            file = features.file(item.video_id)
            described.append([dataclasses.asdict(features.about), file.exists() and _stat(file)])
        if features is not None and features.text is not None:
            asked = {turn.question for draft in item.drafts for turn in draft.example.turns}
            files = [features.text_file(question) for question in sorted(asked)]
            described.append([dataclasses.asdict(features.text),
                              [file.exists() and _stat(file) for file in files]])  # fmt: skip
    return _hash(described)


def _stat(path: epath.PathLike) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file, or of all files right in a folder."""
    if is_remote(path):
        stat = epath.Path(path).stat()
        return stat.length, stat.mtime * 10**9
    path = pathlib.Path(path)  # an epath tells the time in seconds
    if path.is_file():
        return path.stat().st_size, path.stat().st_mtime_ns
    stats = [entry.stat() for entry in os.scandir(path) if entry.is_file()]
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
