"""The weighted mixture: which source, video and turns a row of a bucket holds.

Everything is a pure function of (seed, bucket, row number), by random access.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.records import TASKS, Example, PreparedDataset
from tpo_jax.data.rows import (
    BranchPlan,
    RowBuilder,
    RowError,
    RowPlan,
    marker_count,
    preference_plan,
)
from tpo_jax.data.text import TASK_TOKENS, TextError, render_options

OPTIONS_SHOWN = 0.5  # probability that a multiple-choice question is trained with its options
MAX_REPORTED = 20


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared folder in the mixture.

    Attributes:
      dataset: one split.
      weight: share of rows among the sources of a bucket.
      tasks: task -> share of draws; a task that is not named is not drawn.
    """

    dataset: PreparedDataset
    weight: float
    tasks: Mapping[str, float]

    def __post_init__(self) -> None:
        where = f"data source {self.dataset.path}"
        if not self.weight > 0:
            raise ValueError(f"{where}: weight {self.weight}, expected > 0. Remove the source.")
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"{where}: tasks {sorted(unknown)} unknown, expected {TASKS}.")
        if any(weight < 0 for weight in self.tasks.values()) or not any(self.tasks.values()):
            raise ValueError(f"{where}: task weights {dict(self.tasks)}, expected at least one > 0 "
                             "and none < 0.")

    def draws(self, example: Example) -> bool:
        return self.tasks.get(example.task, 0) > 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Source:
        """Reads an entry {path, weight, tasks} of `data.train`; an unknown key is an error."""
        expected = {"path", "weight", "tasks"}
        if wrong := expected ^ set(config):
            raise ValueError(f"data source {config.get('path')!r}: missing or unknown keys "
                             f"{sorted(wrong)}, expected {sorted(expected)}.")
        return cls(PreparedDataset(config["path"]), config["weight"], dict(config["tasks"]))


def kind_of(example: Example) -> str:
    """The kind of bucket that an example belongs to."""
    return "preference" if example.task == "preference" else "conversation"


def plans_of(dataset: PreparedDataset, example: Example) -> Iterator[RowPlan]:
    """Each turn of an example as a row of its own, at its longest (options shown)."""
    if kind_of(example) == "preference":
        yield preference_plan(dataset, example)
        return
    for i, turn in enumerate(example.turns):
        question = render_options(turn.question, turn.options) if turn.options else turn.question
        branch = BranchPlan(example, i, question, turn.answer)
        yield RowPlan(dataset, example.video_id, example.start, example.end, (branch,))


def check_example(builder: RowBuilder, dataset: PreparedDataset, example: Example) -> list[str]:
    """One message for each turn of an example that does not fit the bucket."""
    errors = []
    for plan in plans_of(dataset, example):
        try:
            turn = example.turns[plan.branches[0].turn]
            if turn.options and turn.answer not in turn.options:
                raise RowError(
                    f"{builder.where(plan, plan.branches[0])}: answer {turn.answer!r} is not one "
                    f"of the options {list(turn.options)}.")
            builder.check(plan)
        except (RowError, TextError) as error:
            errors.append(str(error))
    return errors


class _Epochs:
    """Entry numbers of one source without end, in a new order in every epoch, by random access."""

    def __init__(self, count: int, seed: Sequence[int]):
        self._count, self._seed = count, seed
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Ranks of uniform draws: the stream of Generator.random is stable over NumPy versions.
        draws = np.random.default_rng([*self._seed, epoch]).random(self._count)
        return np.argsort(draws, kind="stable")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._count)
        return int(self._order(epoch)[position])


def _tag(source: int, entry: int) -> tuple[int, int]:
    return source, entry


class Mixture:
    """The stream of rows of one bucket.

    Args:
      builder: checks every example once, here.
      sources: all sources; those without a video (or pair) for this bucket take no part.
      seed: decides shuffling and draws.

    Raises:
      RowError: examples that do not fit (the first 20 by name), or nothing to draw.
    """

    def __init__(self, builder: RowBuilder, sources: Sequence[Source], seed: int):
        self.bucket, self.seed = builder.bucket, seed
        self._key = zlib.crc32(self.bucket.name.encode())
        self.sources: list[Source] = []
        self.entries: list[list[tuple[str, str | None]]] = []
        errors: list[str] = []
        for source in sources:
            entries = []
            for video_id in source.dataset.videos:
                found, wrong = self._entries(builder, source, video_id)
                entries += found
                errors += wrong
            if entries:
                self.sources.append(source)
                self.entries.append(entries)
        if errors:
            shown = "\n".join(f"  {error}" for error in errors[:MAX_REPORTED])
            more = f"\n  ... and {len(errors) - MAX_REPORTED} more" * (len(errors) > MAX_REPORTED)
            raise RowError(f"{len(errors)} examples do not fit bucket {self.bucket.name!r}:\n"
                           f"{shown}{more}")
        if not self.sources:
            raise RowError(
                f"bucket {self.bucket.name!r}: no {self.bucket.media} with a "
                f"{self.bucket.kind} example in {[str(s.dataset.path) for s in sources]} for the "
                f"tasks {[dict(s.tasks) for s in sources]}. Remove the bucket or add the data.")
        self._stream = grain.MapDataset.mix(
            [grain.MapDataset.source(_Epochs(len(entries), [seed, self._key, i]))
             .map(functools.partial(_tag, i)) for i, entries in enumerate(self.entries)],
            [source.weight for source in self.sources])

    def _entries(self, builder: RowBuilder, source: Source, video_id: str) -> tuple[
            list[tuple[str, str | None]], list[str]]:
        """(video, None) of a conversation bucket or (video, pair) of each pair; error messages."""
        dataset = source.dataset
        if dataset.video_info(video_id).media != self.bucket.media:
            return [], []
        mine = [example for example in dataset.examples(video_id)
                if source.draws(example) and kind_of(example) == self.bucket.kind]
        errors = [error for example in mine for error in check_example(builder, dataset, example)]
        if self.bucket.kind == "preference":
            return [(video_id, example.example_id) for example in mine], errors
        return [(video_id, None)] * any(example.turns for example in mine), errors

    def __call__(self, row: int) -> RowPlan:
        """The plan of a row of the global stream."""
        i, j = self._stream[row]
        source, (video_id, pair) = self.sources[i], self.entries[i][j]
        examples = source.dataset.examples(video_id)
        if pair is not None:
            example, = (e for e in examples if e.example_id == pair)
            return preference_plan(source.dataset, example)
        random = np.random.default_rng([self.seed, self._key, row])
        return draw_branches(source, video_id, examples, self.bucket, random)


def draw_branches(source: Source, video_id: str, examples: Sequence[Example], bucket: Bucket,
                  random: np.random.Generator) -> RowPlan:
    """Up to K turns about one clip, tasks by weight, without replacement until none is left.

    The first draw decides the clip; a turn about another clip or beyond the slot capacity of the
    bucket is passed over.
    """
    remaining: dict[str, list[tuple[Example, int]]] = {}
    for example in examples:
        if source.draws(example) and kind_of(example) == bucket.kind:
            remaining.setdefault(example.task, []).extend(
                (example, turn) for turn in range(len(example.turns)))
    remaining = {task: turns for task, turns in remaining.items() if turns}
    used: dict[str, int] = {}
    chosen: list[BranchPlan] = []
    clip: tuple[float, float] | None = None
    while remaining and len(chosen) < bucket.branches:
        task = _weighted(list(remaining), source.tasks, random)
        example, turn = remaining[task].pop(_index(len(remaining[task]), random))
        if not remaining[task]:
            del remaining[task]
        needed = {head: count for head in TASK_TOKENS
                  if (count := _markers(example, turn, head))}
        if clip not in (None, (example.start, example.end)) or any(
                used.get(head, 0) + count > bucket.capacity(head)
                for head, count in needed.items()):
            continue
        clip = (example.start, example.end)
        used |= {head: used.get(head, 0) + count for head, count in needed.items()}
        chosen.append(BranchPlan(
            example, turn, _question(example, turn, random), example.turns[turn].answer))
    assert clip is not None, f"{video_id} has no turn for bucket {bucket.name}"
    return RowPlan(source.dataset, video_id, *clip, tuple(chosen))


def _markers(example: Example, turn: int, head: str) -> int:
    return marker_count(example, head, turn + 1) - marker_count(example, head, turn)


def _question(example: Example, turn: int, random: np.random.Generator) -> str:
    """The question, half of the time with its options in a random order."""
    question, options = example.turns[turn].question, list(example.turns[turn].options)
    if not options or random.random() >= OPTIONS_SHOWN:
        return question
    order = np.argsort(random.random(len(options)))
    return render_options(question, [options[i] for i in order])


def _index(count: int, random: np.random.Generator) -> int:
    return int(random.random() * count)


def _weighted(tasks: Sequence[str], weights: Mapping[str, float],
              random: np.random.Generator) -> str:
    """One of `tasks` with probability in proportion to its weight."""
    shares = np.cumsum([weights[task] for task in tasks])
    return tasks[int(np.searchsorted(shares, random.random() * shares[-1], side="right"))]
