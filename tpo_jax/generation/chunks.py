"""Generated pairs on disk, a file for each chunk of videos.

A chunk that has its file is not done again. Commands that share the folder, each with its --shard
of --shards, take every n-th chunk. The pairs are those of the first chunks, as many as give enough:
the same whoever did which chunk, and whatever more was done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tpo_jax.data import files
from tpo_jax.data.records import Example


class Chunks:
    """The chunks of some videos.

    Args:
      folder: of the files, which hold {"counts": {outcome: number}, "pairs": [...]}.
      videos: in the order in which they are worked through.
      size: videos of a chunk.
    """

    def __init__(self, folder: epath.Path, videos: Sequence[str], size: int):
        self._folder, self._videos, self._size = folder, videos, size
        self._read: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return -(-len(self._videos) // self._size)

    def __getitem__(self, number: int) -> Sequence[str]:
        """The videos of a chunk."""
        return self._videos[number * self._size : (number + 1) * self._size]

    def done(self) -> set[int]:
        """Numbers of the chunks that have their files."""
        there = {file.name for file in self._folder.iterdir()} if self._folder.exists() else set()
        return {n for n in range(len(self)) if n in self._read or self._file(n).name in there}

    def write(self, number: int, pairs: Sequence[Example], counts: Mapping[str, int]) -> None:
        """Keeps a chunk; with several processes all call this and the first one writes."""
        text = json.dumps({"counts": counts, "pairs": [pair.to_json() for pair in pairs]})
        self._read[number] = json.loads(text)
        if jax.process_index() == 0:
            files.write(self._file(number), text)

    def kept(self, end: int) -> int:
        """Pairs of the chunks below `end` that are done."""
        return sum(len(self._chunk(n)["pairs"]) for n in self.done() if n < end)

    def missing(self, wanted: int) -> list[int]:
        """Chunks without which it is not known what the first `wanted` pairs are."""
        found, kept, done = [], 0, self.done()
        for number in range(len(self)):
            if kept >= wanted:
                break
            if number in done:
                kept += len(self._chunk(number)["pairs"])
            else:
                found.append(number)
        return found

    def first(self, wanted: int) -> tuple[list[Example], dict[str, Any]]:
        """The first `wanted` pairs and the report on the chunks that they are from."""
        kept: list[Example] = []
        counts: Counter = Counter()
        videos = 0
        for number in range(len(self)):
            if len(kept) >= wanted:
                break
            chunk = self._chunk(number)
            kept += [Example.from_json(pair) for pair in chunk["pairs"]]
            counts.update(chunk["counts"])
            videos += len(self[number])
        return kept[:wanted], report_of(counts, kept[:wanted], videos)

    def _chunk(self, number: int) -> dict[str, Any]:
        if number not in self._read:
            self._read[number] = json.loads(self._file(number).read_text())
        return self._read[number]

    def _file(self, number: int) -> epath.Path:
        return self._folder / f"{number:05d}.json"


def report_of(counts: Counter, kept: Sequence[Example], videos: int) -> dict[str, Any]:
    """counts.json: what was generated, dropped by reason and kept; dropped + kept = generated."""
    dropped = {key.removeprefix("dropped: "): counts[key] for key in sorted(counts)
               if key.startswith("dropped: ")}
    return {
        "generated": counts["generated"], "dropped": dropped, "kept": counts["kept"],
        "written": len(kept), "videos": videos,
        "videos_with_pairs": len({example.video_id for example in kept}),
        "manipulation": dict(Counter(e.targets["manipulation"] for e in kept)),
        "kind": dict(Counter(e.turns[0].kind for e in kept)),
    }


def agreed(value: int) -> int:
    """What process 0 says: to another one a file may show up later."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
