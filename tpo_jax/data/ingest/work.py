"""One piece of work: decode its media, check its examples, and leave one finished folder behind.

A piece is written under a temporary name and renamed when it is complete, so whatever carries its
final name is whole. A file that cannot be used removes its own records only.
"""

from __future__ import annotations

import dataclasses
import pathlib
import struct
import tempfile
from collections.abc import Iterator

import numpy as np

from tpo_jax.data import tables, validation
from tpo_jax.data.clip_features import FeatureError, FeatureStore
from tpo_jax.data.ingest.files import publish, write_lines
from tpo_jax.data.ingest.plan import MediaItem, Piece, Settings
from tpo_jax.data.problems import Invalid, Problem
from tpo_jax.data.records import CLIP_FRAMES, Clip, IndexEntry, VideoInfo
from tpo_jax.data.video import Decoder, VideoError

# Clips of one video wait here until the whole video is known to be good; larger ones go to disk.
SPOOL_BYTES = 64 * 2**20


def do_piece(
    piece: Piece, settings: Settings, parts: pathlib.Path, features: FeatureStore | None = None
) -> int:
    """Writes parts/<key>/ with clips, examples, index and quarantine, and clip features where they
    are given; returns its problem count."""
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"writing-{piece.key}-", dir=parts))
    clips = tables.writer(temporary / "clips", "clips")
    examples = tables.writer(temporary / "examples", "examples")
    vectors = tables.writer(temporary / "clip_features", "clip_features") if features else None
    entries: list[IndexEntry] = []
    problems: list[Problem] = []
    rows = [0, 0, 0]
    for item in piece.items:
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=temporary) as spool:
            try:
                info = _decode(item, settings, spool)
                given = _features(item, info, features)
            except VideoError as error:
                problems += _item_problems(item, "video", error.file, error.reason, error.fix)
                continue
            except FeatureError as error:
                found = error.problem
                named = (found.file, found.field, found.value)
                value = " ".join(str(part) for part in named if part not in ("", None))
                problems += _item_problems(item, "clip_features", value, found.reason, found.fix)
                continue
            records, bad = _encode_examples(item, info)
            problems += bad
            if not records:
                continue
            for record in _unspool(spool):
                clips.write(record)
        for record in records:
            examples.write(record)
        count = -(-info.num_frames // CLIP_FRAMES)
        if given is not None:
            vectors.write(tables.serialize({"video_id": item.video_id, "features": given}))
        entries.append(
            IndexEntry(
                item.video_id, info, (rows[0], count), (rows[1], len(records)),
                None if given is None else rows[2],
            )
        )  # fmt: skip
        rows = [rows[0] + count, rows[1] + len(records), rows[2] + (given is not None)]
    for writer in filter(None, (clips, examples, vectors)):
        writer.close()
    write_lines(temporary / "index.jsonl", [entry.to_json() for entry in entries])
    write_lines(temporary / "quarantine.jsonl", [problem.to_json() for problem in problems])
    publish(temporary, parts / piece.key)
    return len(problems)


def _decode(item: MediaItem, settings: Settings, spool) -> VideoInfo:
    """Decodes one file into clip records in `spool`."""
    decoder = Decoder(item.path, settings.fps, size=settings.size, frame_rate=item.frame_rate)
    times: list[float] = []
    frames: list[np.ndarray] = []
    shape = None

    def flush():
        chunk = (len(times) - 1) // CLIP_FRAMES
        clip = Clip(
            f"{item.video_id}#{chunk}",
            item.video_id,
            decoder.media,
            chunk,
            np.asarray(times[chunk * CLIP_FRAMES :], np.float32),
            np.stack(frames),
            settings.encoding,
        )
        record = clip.to_record()
        spool.write(struct.pack("<Q", len(record)))
        spool.write(record)
        frames.clear()

    for time, frame in decoder:
        shape = shape or frame.shape
        if frame.shape != shape:
            raise VideoError(
                item.path,
                f"the picture changes from {shape[1]}x{shape[0]} to "
                f"{frame.shape[1]}x{frame.shape[0]} pixels at {time:.3f} s",
                "prepare with --size, or cut the video there",
            )
        times.append(time)
        frames.append(frame)
        if len(frames) == CLIP_FRAMES:
            flush()
    if frames:
        flush()
    timestamps = np.asarray(times, np.float32)
    return VideoInfo(decoder.media, decoder.duration, len(times), timestamps, *shape[:2])


def _unspool(spool) -> Iterator[bytes]:
    spool.seek(0)
    while header := spool.read(8):
        yield spool.read(struct.unpack("<Q", header)[0])


def _encode_examples(item: MediaItem, info: VideoInfo) -> tuple[list[bytes], list[Problem]]:
    """Records of the examples that fit the decoded video, problems of the others."""
    records, problems = [], []
    for draft in item.drafts:
        example = dataclasses.replace(draft.example, media=info.media)
        try:
            example = validation.check_example(example, info.duration)
        except Invalid as invalid:
            problems.append(invalid.at(draft.file, draft.record))
            continue
        records.append(example.to_record(info.timestamps))
    return records, problems


def _features(
    item: MediaItem, info: VideoInfo, features: FeatureStore | None
) -> np.ndarray | None:
    """float32[N, D] of a video, checked; None of an image."""
    if features is None or info.media == "image":
        return None
    return features.read(features.file(item.video_id), info.duration)


def _item_problems(
    item: MediaItem, field: str, value: str, reason: str, fix: str
) -> list[Problem]:
    """One entry per record that a bad file takes with it."""
    return [
        Problem(draft.file, draft.record, field, value, reason, fix) for draft in item.drafts
    ]
