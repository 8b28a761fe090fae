"""Preference pairs as data: a manifest of pairs beside the prepared folder that has their frames.

The manifest (pairs.jsonl) has one Example of task "preference" a line; no frame is copied.
"""

from __future__ import annotations

import json
import os

import numpy as np
from etils import epath

from tpo_jax.data import files
from tpo_jax.data.records import Example, PreparedDataset, RecordError, VideoInfo
from tpo_jax.data.text_features import Texts
from tpo_jax.models.config import ClipFeaturesConfig


class PairedDataset:
    """The pairs of a manifest with the interface of `PreparedDataset`.

    Args:
      path: the prepared folder that the pairs were generated on.
      pairs: the manifest.

    Raises:
      RecordError: a line that is no pair, a repeated id or a video that the folder lacks.
    """

    def __init__(self, path: str | os.PathLike[str], pairs: str | os.PathLike[str]):
        self._arguments = (os.fspath(path), os.fspath(pairs))
        self._dataset = PreparedDataset(path)
        self.path = epath.Path(pairs)
        self._pairs: dict[str, list[Example]] = {}
        known, seen = set(self._dataset.videos), set()
        for number, line in enumerate(files.read_text(self.path, "pairs").splitlines(), start=1):
            pair = self._parse(line, number, known)
            if pair.example_id in seen:
                raise RecordError(f"{self.path}:{number}: pair {pair.example_id!r} occurs twice; "
                                  "remove one of the lines")
            seen.add(pair.example_id)
            self._pairs.setdefault(pair.video_id, []).append(pair)

    def __reduce__(self):
        return PairedDataset, self._arguments

    def _parse(self, line: str, number: int, known: set[str]) -> Example:
        try:
            pair = Example.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{self.path}:{number}: not an example ({error}); generate the pairs "
                              "again or remove the line") from error
        if pair.task != "preference":
            raise RecordError(f"{self.path}:{number}: task {pair.task!r}, expected 'preference'")
        if pair.video_id not in known:
            raise RecordError(
                f"{self.path}:{number}: video {pair.video_id!r} is not in {self._dataset.path}; "
                "give the prepared folder that the pairs were generated on")
        return pair

    @property
    def videos(self) -> list[str]:
        """Ids of the videos that have pairs, in the order of the prepared folder."""
        return [video_id for video_id in self._dataset.videos if video_id in self._pairs]

    @property
    def kinds(self) -> list[str]:
        """Kinds of question of the pairs."""
        return sorted({turn.kind for pairs in self._pairs.values() for pair in pairs
                       for turn in pair.turns})

    def video_info(self, video_id: str) -> VideoInfo:
        return self._dataset.video_info(video_id)

    def examples(self, video_id: str) -> list[Example]:
        """The pairs about one video."""
        return self._pairs.get(video_id, [])

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """uint8[F, h, w, 3]; see PreparedDataset."""
        return self._dataset.frames(video_id, indices)

    @property
    def clip_features_config(self) -> ClipFeaturesConfig | None:
        return self._dataset.clip_features_config

    def clip_features(self, video_id: str) -> np.ndarray:
        """float32[N, D]; see PreparedDataset."""
        return self._dataset.clip_features(video_id)

    @property
    def texts(self) -> Texts | None:
        return self._dataset.texts
