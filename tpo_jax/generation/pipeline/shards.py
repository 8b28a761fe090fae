"""The chunks of videos that pass through the stages together, and how commands share --out.

A command that is alone writes the manifests of --out, chunk after chunk. Of N commands each takes
every N-th chunk and writes manifests of its own, in shards/I-of-N of --out, with a record in
chunks.jsonl of every chunk that is done. Whoever finishes last takes all records over into --out,
in the order of the chunks: the manifests are those of a command that was alone.

What a command finds of its chunks in any of these folders it takes over and goes on from there, so
that the number of commands may change between two starts.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from tpo_jax.generation.pipeline.manifest import (
    Folder,
    Record,
    check_options,
    read_records,
    whole_lines,
)
from tpo_jax.generation.pipeline.stages import FILES, KEYS, Pipeline
from tpo_jax.parallel.distributed import of_process_0

PARTS = "shards"
CHUNKS = "chunks.jsonl"
PART_FILES = FILES | {"chunks": CHUNKS}
TAKEN_OVER = tuple(stage for stage in FILES if stage != "pairs")  # pairs follow from the others

# (stage, chunk) -> records that another folder has
Found = Mapping[tuple[str, int], Sequence[Record]]


@dataclasses.dataclass(frozen=True)
class Work:
    """The chunks of some videos and the folder that keeps what is made of them.

    Attributes:
      path: --out.
      videos: in the order in which they are worked through.
      size: videos of a chunk.
      options: by stage, as of `manifest.Folder`.
    """

    path: epath.Path
    videos: Sequence[str]
    size: int
    options: Mapping[str, Mapping[str, Any]]

    def __len__(self) -> int:
        return -(-len(self.videos) // self.size)

    def __getitem__(self, number: int) -> Sequence[str]:
        """The videos of a chunk."""
        return self.videos[number * self.size : (number + 1) * self.size]

    def whole(self) -> Folder:
        """--out itself."""
        return Folder(self.path, FILES, self.options, KEYS)

    def part(self, shard: int, shards: int) -> Folder:
        """That of one of several commands."""
        return Folder(self.path / PARTS / f"{shard}-of-{shards}", PART_FILES, self._part_options,
                      KEYS)

    @property
    def _part_options(self) -> Mapping[str, Mapping[str, Any]]:
        return {**self.options, "chunks": {"chunk_videos": self.size}}

    def _parts(self) -> list[epath.Path]:
        """The folders of parts that there are, as process 0 sees them."""
        names: list[str] = []
        if jax.process_index() == 0 and (self.path / PARTS).exists():
            names = sorted(part.name for part in (self.path / PARTS).iterdir())
        return [self.path / PARTS / name for name in json.loads(
            of_process_0(json.dumps(names).encode()))]

    def kept(self) -> dict[int, int]:
        """How many pairs each chunk gives that is done by one of several commands."""
        found = {}
        for part in self._parts():
            file = part / CHUNKS
            for name, record in read_records(file, whole_lines(file)).items():
                found[int(name)] = record["kept"]
        return found

    def missing(self, wanted: int) -> list[int]:
        """Chunks without which it is not known what the first `wanted` pairs are."""
        found, pairs, kept = [], 0, self.kept()
        for number in range(len(self)):
            if pairs >= wanted:
                break
            if number in kept:
                pairs += kept[number]
            else:
                found.append(number)
        return found

    def elsewhere(self, folder: Folder, numbers: Iterable[int]) -> Found:
        """What folders but this one have of these chunks and it has not.

        Raises:
          ManifestError: a folder was made with other options.
        """
        numbers = set(numbers)
        chunk_of = {video: i // self.size for i, video in enumerate(self.videos)}
        found: dict[tuple[str, int], list[Record]] = defaultdict(list)
        there = {stage: set(folder[stage].records) for stage in TAKEN_OVER}
        for path, names, options in (
            (self.path, FILES, self.options),
            *((part, PART_FILES, self._part_options) for part in self._parts()),
        ):
            if path == folder.path:
                continue
            check_options(path, names, options)
            for stage in TAKEN_OVER:
                file = path / FILES[stage]
                for name, record in read_records(file, whole_lines(file)).items():
                    chunk = chunk_of.get(record["video_id"])
                    if chunk in numbers and name not in there[stage]:
                        there[stage].add(name)
                        found[stage, chunk].append(record)
        return found


def take_over(folder: Folder, found: Found, number: int) -> None:
    """Writes what was found of a chunk into the manifests of `folder`."""
    for stage in TAKEN_OVER:
        if records := found.get((stage, number)):
            for record in records:
                folder[stage].append(record)
            folder[stage].sync()


def run_whole(work: Work, folder: Folder, found: Found, pipeline: Pipeline, wanted: int,
              progress: Callable[[int], None] = lambda pairs: None) -> None:
    """Works through the chunks until `wanted` pairs are written into --out.

    Args:
      folder: of `Work.whole`, open; that of the pipeline.
      found: of `Work.elsewhere`.
      progress: is told the number of pairs.
    """
    written = folder["pairs"].records
    for number in range(len(work)):
        if len(written) >= wanted:
            break
        take_over(folder, found, number)
        pipeline.run(work[number], wanted)
        progress(len(written))


def run_part(work: Work, folder: Folder, found: Found, pipeline: Pipeline, wanted: int,
             numbers: Sequence[int], progress: Callable[[int], None] = lambda pairs: None) -> None:
    """Works through the chunks `numbers`, until those before one give enough pairs.

    Args:
      folder: of `Work.part`, open; that of the pipeline.
      found, progress: as of `run_whole`.
    """
    chunks = folder["chunks"]
    for number in numbers:
        if sum(pairs for n, pairs in work.kept().items() if n < number) >= wanted:
            break
        if str(number) not in chunks.records:
            take_over(folder, found, number)
            kept = pipeline.run(work[number], wanted)
            chunks.append({"id": str(number), "kept": kept})
            chunks.sync()
        progress(min(sum(work.kept().values()), wanted))
