"""Calls of heads that answer frame by frame, over every frame that the prepared table stores.

By default such heads answer for the frames that the language model is shown, and those are scored.
The protocols of video segmentation and tracking score every annotated frame. Here `Router` takes
these heads over the whole clip (`generation.whole_video`); a label is scored on the stored frame
nearest to it (`benchmarks.match_times`, once). A clip of which every stored frame is shown is
answered and scored as by default: there is nothing to add.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.rows import RowBuilder, RowPlan
from tpo_jax.errors import UserError
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.asked import slots_of
from tpo_jax.evaluation.benchmarks import Call
from tpo_jax.generation.routing import Place, Router
from tpo_jax.generation.sampler import Generation
from tpo_jax.generation.whole_video import StoredFilm
from tpo_jax.models.heads import HEADS, ClipInfo, heads_of

MASK_FRAMES = ("shown", "all")


def by_frame(heads: Sequence[str]) -> dict[str, str]:
    """{task: head} of the heads of a model that answer frame by frame."""
    return {task: name for task, name in heads_of(heads).items() if HEADS[name].whole_video}


def check(heads: Sequence[str], called: Collection[str], *, task_text: bool) -> None:
    """Refuses `--mask_frames=all` where it would mean nothing.

    Args:
      heads: of the model.
      called: tasks of the heads that the questions ask for.
      task_text: whether places are read from the words of answers.
    """
    if task_text:
        raise UserError(
            "--mask_frames=all: with --task_text places are read from words, not from frames; "
            "leave one of the two out"
        )
    if not set(called) & set(by_frame(heads)):
        raise UserError(
            f"--mask_frames=all: the questions call {sorted(called)}, of which no head of the "
            f"model, {list(heads)}, answers frame by frame; add mask or tracking to --tasks, or "
            "leave it out"
        )


def stored_film(builder: RowBuilder, plan: RowPlan) -> StoredFilm | None:
    """What the table stores of a row's clip; None where every stored frame of it is shown."""
    info = plan.dataset.video_info(plan.video_id)
    if info.media != "video":
        return None
    stored = sampling.frames_between(info.timestamps, plan.start, plan.end)
    if not np.setdiff1d(stored, builder.frame_indices(plan)).size:
        return None
    return StoredFilm(plan.dataset, plan.video_id, plan.start, plan.end, builder.prepare)


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a row's calls are answered about.

    Attributes:
      shown: float[F] seconds of the frames that the language model is shown.
      film: the stored frames, where heads are taken over them.
      tasks: of the heads that are.
    """

    shown: np.ndarray
    film: StoredFilm | None = None
    tasks: Collection[str] = ()

    def filmed(self, call: Call) -> bool:
        return self.film is not None and call.head in self.tasks

    def score(self, call: Call, prediction: Mapping[str, Any] | None) -> dict[str, float]:
        """{metric: value}"""
        times, once = self._frames(call)
        return benchmarks.score_call(call, prediction, times, once=once)

    def count(self, call: Call, counts: dict[str, Counter[str]]) -> None:
        """Adds the frames that a mask or track is annotated on, and those that are scored; without
        labels those that are asked for, and those of them that are answered."""
        if call.head != "mask":
            return
        times, once = self._frames(call)
        names = ("annotated", "scored") if call.example.labelled else ("asked", "answered")
        found = benchmarks.annotated_frames(call, times, once=once)
        counts.setdefault(call.example.task, Counter()).update(dict(zip(names, found, strict=True)))

    def _frames(self, call: Call) -> tuple[np.ndarray, bool]:
        return (self.film.times(), True) if self.filmed(call) else (self.shown, False)


@dataclasses.dataclass(frozen=True)
class Forced:
    """What heads say of a batch at the slots of labelled answers.

    Attributes:
      labels: the batch of labelled answers.
      predictions: {head: {name: [B, S, ...]}} about the frames that are shown.
      filmed: {item of a call: what `decode` gives} about all stored frames, where heads are taken
        over them.
    """

    labels: Mapping[str, Any]
    predictions: Mapping[str, Mapping[str, np.ndarray]]
    filmed: Mapping[str, Mapping[str, Any]]


def forced_over_films(
    router: Router,
    params: Any,
    batch: Mapping[str, Any],
    generation: Generation,
    rows: Sequence[tuple[RowPlan, ClipInfo, StoredFilm | None]],
    states: Mapping[str, np.ndarray],
    skip: Collection[str],
) -> dict[str, Mapping[str, Any]]:
    """`Forced.filmed`.

    The questions are those of the free answers; only the slots are the labelled ones.

    Args:
      batch: of the questions, with their `generation`.
      rows: of the batch that are not filling.
      states: {task: float32[B, S, D]} at the slots of labelled answers.
      skip: items that need none.
    """
    tasks = by_frame(router.heads)
    asked = [(row, *slot) for row, (plan, _, film) in enumerate(rows) if film is not None
             for slot in slots_of(plan) if slot[0].head in tasks]  # fmt: skip
    most = 1 + max((call.place for _, call, *_ in asked), default=0)
    shape = (*generation.lengths.shape, most)
    heads = np.full(shape, -1, np.int32)
    vectors = np.zeros((*shape, generation.event_states.shape[-1]), np.float32)
    items: dict[Place, str] = {}
    for row, call, branch, slot in asked:
        place = row, branch, call.place
        heads[place] = router.heads.index(tasks[call.head])
        vectors[place] = states[call.head][row, slot]
        if call.item not in skip:
            items[place] = call.item
    if not items:
        return {}
    labelled = dataclasses.replace(generation, event_heads=heads, event_states=vectors)
    _, clips, films = zip(*rows, strict=True)
    found = router.over_films(params, batch, labelled, clips, films, items)
    return {items[place]: result for place, result in found.items()}
