"""From finished pieces to the prepared folder, which appears in one rename."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from tpo_jax.data import tables
from tpo_jax.data.ingest.files import link, publish, read_lines, write_json, write_lines
from tpo_jax.data.ingest.plan import Plan, PrepareError
from tpo_jax.data.ingest.statistics import summarise
from tpo_jax.data.records import FORMAT_VERSION, Example, IndexEntry


class NothingLeft(PrepareError):
    """Every record is in quarantine; the message shows the first ones."""


def assemble(plan: Plan, parts: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Joins the pieces of a plan into `out`; returns the statistics.

    The files of the pieces become the shards of the tables as they are. Nothing carries the name
    `out` before it is complete, and the pieces stay until then.

    Raises:
      NothingLeft: no piece has a usable record.
    """
    quarantine = [problem.to_json() for problem in plan.problems]
    for piece in plan.pieces:
        quarantine += read_lines(parts / piece.key / "quarantine.jsonl")
    folders = [parts / piece.key for piece in plan.pieces]
    encoding = plan.settings.encoding
    indices = [
        [IndexEntry.from_json(entry, encoding) for entry in read_lines(f / "index.jsonl")]
        for f in folders
    ]
    used = [(folder, index) for folder, index in zip(folders, indices, strict=True) if index]
    if not used:
        raise NothingLeft(_nothing_left(quarantine, out))
    building = parts.parent / "assembling"
    shutil.rmtree(building, ignore_errors=True)
    entries = _join([index for _, index in used])
    settings = dataclasses.asdict(plan.settings)
    if any(_rows(entry, "clip_features") for entry in entries):  # images have none
        settings["clip_features"] = dataclasses.asdict(plan.features.about)
    if any(_rows(entry, "text_features") for entry in entries):
        settings["text_features"] = dataclasses.asdict(plan.features.text)
    for table in ("clips", "examples", *settings.keys() & {"clip_features", "text_features"}):
        _build_table(building / table, table, encoding, used)
    write_lines(building / "index.jsonl", [entry.to_json() for entry in entries])
    write_lines(building / "quarantine.jsonl", quarantine)
    statistics = summarise(entries, _examples(building), quarantine)
    write_json(building / "statistics.json", statistics)
    write_json(
        building / "prepared.json",
        {"format_version": FORMAT_VERSION, "fingerprint": plan.fingerprint, **settings},
    )
    if out.is_dir():
        out.rmdir()  # empty: checked before the work began
    publish(building, out)
    return statistics


def _build_table(
    folder: pathlib.Path, table: str, encoding: str,
    used: Sequence[tuple[pathlib.Path, Sequence[IndexEntry]]],
) -> None:  # fmt: skip
    folder = folder / tables.TABLE_VERSION
    folder.mkdir(parents=True)
    lengths = {part / table: sum(_rows(entry, table) for entry in index) for part, index in used}
    lengths = {shard: length for shard, length in lengths.items() if length}
    for i, shard in enumerate(lengths):
        link(shard, folder / tables.shard_name(table, i, len(lengths)))
    tables.write_metadata(folder, table, encoding, list(lengths.values()))


def _rows(entry: IndexEntry, table: str) -> int:
    """Records of a video in a table."""
    if table == "clip_features":
        return int(entry.clip_features is not None)
    if table == "text_features":
        return 0 if entry.text_features is None else len(entry.text_features[1])
    return getattr(entry, table)[1]


def _join(indices: Sequence[Sequence[IndexEntry]]) -> list[IndexEntry]:
    """Row numbers within pieces to row numbers within tables."""
    joined: list[IndexEntry] = []
    clips = examples = features = texts = 0
    for index in indices:
        for entry in index:
            joined.append(
                dataclasses.replace(
                    entry,
                    clips=(clips, entry.clips[1]),
                    examples=(examples, entry.examples[1]),
                    clip_features=features if _rows(entry, "clip_features") else None,
                    text_features=entry.text_features and (texts, entry.text_features[1]),
                )
            )
            clips += entry.clips[1]
            examples += entry.examples[1]
            features += _rows(entry, "clip_features")
            texts += _rows(entry, "text_features")
    return joined


def _examples(folder: pathlib.Path) -> Iterator[Example]:
    table = tables.open_table(folder / "examples")
    return (Example.from_record(table[i]) for i in range(len(table)))


def _nothing_left(quarantine: Sequence[dict[str, Any]], out: pathlib.Path) -> str:
    shown = "".join(
        f"\n  {q['file']} [{q['record']}] {q['field']}: {q['reason']}" for q in quarantine[:5]
    )
    return f"{out} is not written: all {len(quarantine)} records are in quarantine:{shown}"
