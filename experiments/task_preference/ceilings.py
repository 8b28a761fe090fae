"""What targets in words can reach: the labels themselves, written as text and read back."""

from __future__ import annotations

import collections

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.task_text import with_text
from tpo_jax.evaluation import benchmarks
from tpo_jax.generation.task_text import read_results
from tpo_jax.models.heads import ClipInfo


def words_at_best(dataset: PreparedDataset, frames: int) -> dict[str, list[float]]:
    """{metric: score of every head call} over the videos of a split.

    The format has limits of its own: hundredths of a frame, three boxes a track, filled boxes for
    masks, and a saliency that only the windows give.

    Args:
      frames: how many a model is shown of a clip.
    """
    scores: dict[str, list[float]] = collections.defaultdict(list)
    for video in dataset.videos:
        if dataset.video_info(video).media != "video":
            continue
        for example in dataset.examples(video):
            clip = _clip(dataset, example, frames)
            for turn, written in enumerate(with_text(example).turns):
                calls = benchmarks.find_calls(example, turn)
                read = read_results(written.answer, [call.head for call in calls], clip)
                for call, result in zip(calls, read, strict=True):
                    for metric, value in benchmarks.score_call(call, result, clip.times).items():
                        scores[metric].append(value)
    return dict(scores)


def _clip(dataset: PreparedDataset, example: Example, frames: int) -> ClipInfo:
    info = dataset.video_info(example.video_id)
    shown = np.unique(sampling.uniform(info.timestamps, frames, example.start, example.end))
    return ClipInfo(
        start=example.start, end=example.end, times=np.asarray(info.timestamps)[shown],
        frame_valid=np.ones(len(shown), bool), height=info.height, width=info.width,
    )  # fmt: skip
