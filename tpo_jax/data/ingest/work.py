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
from typing import IO

import numpy as np

from tpo_jax.data import tables, text_features
from tpo_jax.data.clip_features import FeatureError, FeatureStore
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.ingest.files import publish, write_lines
from tpo_jax.data.ingest.plan import MediaItem, Piece, Settings
from tpo_jax.data.problems import Invalid, Problem
from tpo_jax.data.records import CLIP_FRAMES, Clip, Example, IndexEntry, VideoInfo
from tpo_jax.data.video import Decoder, VideoError

# Clips of one video wait here until the whole video is known to be good; larger ones go to disk.
SPOOL_BYTES = 64 * 2**20


def do_piece(
    piece: Piece, settings: Settings, parts: pathlib.Path, features: FeatureStore | None = None
) -> int:
    """Writes parts/<key>/ with clips, examples, index and quarantine, and clip and text features
    where they are given; returns its problem count."""
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"writing-{piece.key}-", dir=parts))
    clips = tables.writer(temporary / "clips", "clips")
    examples = tables.writer(temporary / "examples", "examples")
    vectors = tables.writer(temporary / "clip_features", "clip_features") if features else None
    has_texts = features is not None and features.text is not None
    states = tables.writer(temporary / "text_features", "text_features") if has_texts else None
    entries: list[IndexEntry] = []
    problems: list[Problem] = []
    rows = [0, 0, 0, 0]
    for item in piece.items:
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=temporary) as spool:
            try:
                info = _decode(item, settings, spool)
                given = _features(item, info, features)
            except VideoError as error:
                problems += _item_problems(item, "video", error.file, error.reason, error.fix)
                continue
            except FeatureError as error:
                value, found = _place(error.problem), error.problem
                problems += _item_problems(item, "clip_features", value, found.reason, found.fix)
                continue
            records, texts, bad = _encode_examples(item, info, features)
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
        for question, array in texts.values():
            states.write(tables.serialize(
                {"video_id": item.video_id, "question": question, text_features.ARRAY: array}
            ))  # fmt: skip
        entries.append(
            IndexEntry(
                item.video_id, info, (rows[0], count), (rows[1], len(records)),
                None if given is None else rows[2], (rows[3], tuple(texts)) if texts else None,
            )
        )  # fmt: skip
        added = (count, len(records), int(given is not None), len(texts))
        rows = [row + more for row, more in zip(rows, added, strict=True)]
    for writer in filter(None, (clips, examples, vectors, states)):
        writer.close()
    write_lines(temporary / "index.jsonl", [entry.to_json() for entry in entries])
    write_lines(temporary / "quarantine.jsonl", [problem.to_json() for problem in problems])
    publish(temporary, parts / piece.key)
    return len(problems)


def _decode(item: MediaItem, settings: Settings, spool: IO[bytes]) -> VideoInfo:
    """Decodes one file into clip records in `spool`."""
    decoder = Decoder(item.path, settings.fps, size=settings.size, frame_rate=item.frame_rate)
    times: list[float] = []
    frames: list[np.ndarray] = []
    shape = None

    def flush() -> None:
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
    info = (decoder.media, decoder.duration, len(times), timestamps, *shape[:2])
    return VideoInfo(*info, settings.encoding)


def _unspool(spool: IO[bytes]) -> Iterator[bytes]:
    spool.seek(0)
    while header := spool.read(8):
        yield spool.read(struct.unpack("<Q", header)[0])


def _encode_examples(
    item: MediaItem, info: VideoInfo, features: FeatureStore | None
) -> tuple[list[bytes], dict[str, tuple[str, np.ndarray]], list[Problem]]:
    """Records of the examples that fit the decoded video, the text features of their questions as
    {name: (question, float32[n, D])}, and problems of the other examples."""
    records, texts, problems = [], {}, []
    for draft in item.drafts:
        example = dataclasses.replace(draft.example, media=info.media)
        try:
            example = check_example(example, info.duration)
            texts |= _texts(example, features)
        except Invalid as invalid:
            problems.append(invalid.at(draft.file, draft.record))
            continue
        except FeatureError as error:
            value, found = _place(error.problem), error.problem
            problems.append(Problem(draft.file, draft.record, "text_features", value,
                                    found.reason, found.fix))  # fmt: skip
            continue
        records.append(example.to_record(info.timestamps))
    return records, texts, problems


def _texts(
    example: Example, features: FeatureStore | None
) -> dict[str, tuple[str, np.ndarray]]:
    """Of every question that has some, and of those whose answers call a head that reads them."""
    if features is None or features.text is None or example.media == "image":
        return {}
    asked = [
        turn.question for turn in example.turns
        if text_features.calls_reader(turn.answer) or features.text_file(turn.question).exists()
    ]  # fmt: skip
    return {text_features.question_name(q): (q, features.read_text(q)) for q in asked}


def _features(
    item: MediaItem, info: VideoInfo, features: FeatureStore | None
) -> np.ndarray | None:
    """float32[N, D] of a video, checked; None of an image."""
    if features is None or info.media == "image":
        return None
    return features.read(features.file(item.video_id), info.duration)


def _place(problem: Problem) -> str:
    """File, field and value of a problem in a file of features."""
    named = (problem.file, problem.field, problem.value)
    return " ".join(str(part) for part in named if part not in ("", None))


def _item_problems(
    item: MediaItem, field: str, value: str, reason: str, fix: str
) -> list[Problem]:
    """One entry per record that a bad file takes with it."""
    return [
        Problem(draft.file, draft.record, field, value, reason, fix) for draft in item.drafts
    ]
