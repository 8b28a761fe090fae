"""A prepared folder with other examples about the videos of an existing one.

Preference pairs that a model generates are such a folder: the clips, and features of them, are
those of the source, by hard link, and only the examples table is new.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

from tpo_jax.data import tables
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.ingest.files import link, publish, write_json, write_lines
from tpo_jax.data.ingest.plan import PrepareError
from tpo_jax.data.ingest.statistics import summarise
from tpo_jax.data.records import Example, IndexEntry, PreparedDataset


def derive(
    source: PreparedDataset, examples: Iterable[Example], out: pathlib.Path
) -> dict[str, Any]:
    """Writes `out` in one rename and returns its statistics.

    Raises:
      PrepareError: `out` exists, or there is no example.
      KeyError: an example names a video that `source` does not have.
      Invalid: an example is not valid.
    """
    if out.exists():
        raise PrepareError(f"{out} exists; remove it or choose another folder")
    by_video: dict[str, list[Example]] = collections.defaultdict(list)
    for example in examples:
        duration = source.video_info(example.video_id).duration
        by_video[example.video_id].append(check_example(example, duration))
    if not by_video:
        raise PrepareError(f"{out} is not written: there is no example")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = pathlib.Path(tempfile.mkdtemp(prefix=f"{out.name}.writing-", dir=out.parent))
    shared = ("clips", *(("clip_features",) if source.clip_features_config else ()),
              *(("text_features",) if source.texts else ()))  # fmt: skip
    for table in shared:
        _link_table(source.path / table / tables.TABLE_VERSION, building / table)
    entries = _write_examples(source, by_video, building / "examples" / tables.TABLE_VERSION)
    write_lines(building / "index.jsonl", [entry.to_json() for entry in entries])
    write_lines(building / "quarantine.jsonl", [])
    statistics = summarise(entries, (e for es in by_video.values() for e in es), [])
    write_json(building / "statistics.json", statistics)
    write_json(building / "prepared.json", source.settings | {"derived_from": str(source.path)})
    building.chmod(0o755)  # mkdtemp makes it private
    publish(building, out)
    return statistics


def _link_table(source: pathlib.Path, target: pathlib.Path) -> None:
    folder = target / tables.TABLE_VERSION
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if tables.is_shard(file.name):
            link(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _write_examples(
    source: PreparedDataset, by_video: dict[str, list[Example]], folder: pathlib.Path
) -> list[IndexEntry]:
    """One shard, in the order of the videos of `source`."""
    folder.mkdir(parents=True)
    writer = tables.writer(folder / tables.shard_name("examples", 0, 1), "examples")
    entries, row = [], 0
    for video_id in source.videos:
        examples = by_video.get(video_id, [])
        if not examples:
            continue
        for example in examples:
            writer.write(example.to_record(source.video_info(video_id).timestamps))
        entry = source.entry(video_id)
        entries.append(dataclasses.replace(entry, examples=(row, len(examples))))
        row += len(examples)
    writer.close()
    tables.write_metadata(folder, "examples", "raw", [row])
    return entries
