"""The weighted mixture: which source, video and turns a row of a bucket holds.

Everything is a pure function of (seed, bucket, row number) and of the shares of the sources, by
random access. What a source gives is a function of (seed, bucket, source, position) alone, so the
sources may change at a checkpoint without disturbing each other (`data.shares`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.records import Example, PreparedDataset, known_tasks
from tpo_jax.data.row_plans import preference_plan
from tpo_jax.data.rows import (
    BranchPlan,
    RowBuilder,
    RowError,
    RowPlan,
    choose_builder,
    marker_count,
)
from tpo_jax.data.shares import Shares, describe
from tpo_jax.data.text import TASK_TOKENS, TextError, render_options
from tpo_jax.errors import UserError

MAX_REPORTED = 20
# What an entry of `data.train` need not say.
SOURCE_DEFAULTS = {"kinds": (), "pairs": ""}


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared folder in the mixture.

    Attributes:
      dataset: one split.
      weight: share of rows among the sources of a bucket.
      tasks: task -> share of draws; a task that is not named is not drawn.
      kinds: kinds of question that are drawn from conversations; empty for all.
    """

    dataset: PreparedDataset | PairedDataset
    weight: float
    tasks: Mapping[str, float]
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"data source {self.dataset.path}"
        if not self.weight > 0:
            raise UserError(f"{where}: weight {self.weight}, expected > 0. Remove the source.")
        if unknown := set(self.tasks) - set(known_tasks()):
            raise UserError(f"{where}: tasks {sorted(unknown)} unknown, expected {known_tasks()}.")
        if any(weight < 0 for weight in self.tasks.values()) or not any(self.tasks.values()):
            raise UserError(f"{where}: task weights {dict(self.tasks)}, expected at least one > 0 "
                            "and none < 0.")

    @property
    def described(self) -> str:
        """What stays the same while this is the same source; see `data.shares`."""
        path, tasks = str(self.dataset.path), dict(self.tasks)
        return describe({"path": path, "tasks": tasks, "kinds": list(self.kinds)})

    def draws(self, example: Example, turn: int) -> bool:
        if example.task == "conversation" and self.kinds:
            return self.tasks.get("conversation", 0) > 0 and example.turns[turn].kind in self.kinds
        return self.tasks.get(example.task, 0) > 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Source:
        """Reads an entry {path, weight, tasks} of `data.train`; another key is an error.

        An entry may also list `kinds`, and name `pairs`, a pairs.jsonl that replaces the examples
        of the folder.
        """
        config = SOURCE_DEFAULTS | dict(config)
        expected = {"path", "weight", "tasks", *SOURCE_DEFAULTS}
        if wrong := expected ^ set(config):
            raise UserError(f"data source {config.get('path')!r}: missing or unknown keys "
                            f"{sorted(wrong)}, expected {sorted(expected)}.")
        path, pairs, kinds = config["path"], config["pairs"], config["kinds"]
        dataset = PairedDataset(path, pairs) if pairs else PreparedDataset(path)
        if kinds and (unknown := set(kinds) - set(dataset.kinds)):
            raise UserError(f"data source {path!r}: kinds {sorted(unknown)} do not occur there, "
                            f"expected some of {dataset.kinds}.")
        return cls(dataset, config["weight"], dict(config["tasks"]), tuple(kinds))


def kind_of(example: Example) -> str:
    """The kind of bucket that an example belongs to."""
    return _kind_of_task(example.task)


def _kind_of_task(task: str) -> str:
    return "preference" if task == "preference" else "conversation"


@dataclasses.dataclass(frozen=True)
class Draw:
    """One thing that a row may ask about its video.

    Attributes:
      example: number of the example among those of its video.
      turn: index of its turn.
      options_shown: whether the question lists its options.
    """

    example: int
    turn: int
    options_shown: bool


def draws_of(
    group: Sequence[RowBuilder], source: Source, video_id: str
) -> tuple[dict[str, list[Draw]], list[str]]:
    """What the buckets of a group may draw about a video: each turn goes to one of them.

    A question with options counts as two draws: as it is, and with its options listed.

    Args:
      group: builders of all buckets of this media and kind, the smallest first. A draw belongs to
        the first that it fits, so that short branches or clips are not padded to long ones.

    Returns: draws by bucket name, and one message for each turn that fits no bucket.
    """
    draws: dict[str, list[Draw]] = {builder.bucket.name: [] for builder in group}
    errors: list[str] = []
    for number, example in enumerate(source.dataset.examples(video_id)):
        if kind_of(example) != group[0].bucket.kind:
            continue
        for turn in range(len(example.turns)):
            if not source.draws(example, turn):
                continue
            for shown in (True, False) if example.turns[turn].options else (False,):
                plan = plan_of(source.dataset, example, turn, shown)
                try:
                    builder = choose_builder(group, plan)
                    _check_options(builder, plan)
                    builder.check(plan)
                except (RowError, TextError) as error:
                    errors.append(str(error))
                    break
                draws[builder.bucket.name].append(Draw(number, turn, shown))
    return draws, errors


def plan_of(
    dataset: PreparedDataset | PairedDataset, example: Example, turn: int, options_shown: bool
) -> RowPlan:
    """A row of one turn; its options, if shown, are in the order of the annotation."""
    if kind_of(example) == "preference":
        return preference_plan(dataset, example)
    question, options = example.turns[turn].question, example.turns[turn].options
    if options_shown:
        question = render_options(question, options)
    branch = BranchPlan(example, turn, question, example.turns[turn].answer)
    return RowPlan(dataset, example.video_id, example.start, example.end, (branch,))


def _check_options(builder: RowBuilder, plan: RowPlan) -> None:
    branch = plan.branches[0]
    turn = branch.example.turns[branch.turn]
    if turn.options and turn.answer not in turn.options:
        raise RowError(
            f"{builder.where(plan, branch)}: answer {turn.answer!r} is not one of the options "
            f"{list(turn.options)}.")


class _Epochs:
    """Entry numbers of one source without end, in a new order in every epoch, by random access."""

    def __init__(self, count: int, seed: Sequence[int]):
        self._count, self._seed = count, seed
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)

    def __reduce__(self):
        return _Epochs, (self._count, self._seed)

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Ranks of uniform draws: the stream of Generator.random is stable over NumPy versions.
        draws = np.random.default_rng([*self._seed, epoch]).random(self._count)
        return np.argsort(draws, kind="stable")

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._count)
        return int(self._order(epoch)[position])


# A video and what may be drawn about it.
Entry = tuple[str, list[Draw]]


# What the sources (by number) have for a bucket.
Parts = dict[int, tuple[Source, list[Entry]]]


def find_entries(
    group: Sequence[RowBuilder], sources: Mapping[int, Source]
) -> dict[str, Parts]:
    """What there is for the buckets of one media and kind, by name; reads every example once.

    Args:
      group: their builders, the smallest first.
      sources: all sources; those without a video (or pair) for a bucket take no part in it.

    Raises:
      RowError: examples that do not fit (the first 20 by name), or a bucket with nothing to draw.
    """
    parts: dict[str, Parts] = {b.bucket.name: {} for b in group}
    errors: list[str] = []
    for number, source in sources.items():
        entries: dict[str, list[Entry]] = {name: [] for name in parts}
        for video_id in source.dataset.videos:
            if source.dataset.video_info(video_id).media != group[0].bucket.media:
                continue
            draws, wrong = draws_of(group, source, video_id)
            errors += wrong
            for name, found in draws.items():
                entries[name] += _entries(group[0].bucket.kind, video_id, found)
        for name, found in entries.items():
            if found:
                parts[name][number] = source, found
    if errors:
        shown = "\n".join(f"  {error}" for error in errors[:MAX_REPORTED])
        more = f"\n  ... and {len(errors) - MAX_REPORTED} more" * (len(errors) > MAX_REPORTED)
        raise RowError(f"{len(errors)} examples do not fit their bucket:\n{shown}{more}")
    for builder in group:
        if not parts[builder.bucket.name]:
            raise RowError(
                f"bucket {builder.bucket.name!r}: no {builder.bucket.media} with a "
                f"{builder.bucket.kind} example in "
                f"{[str(s.dataset.path) for s in sources.values()]} for "
                f"the tasks {[dict(s.tasks) for s in sources.values()]} that no smaller bucket "
                "takes. Remove the bucket or add the data.")
    return parts


def count_unseen(
    source: Source, shown: Collection[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """How many videos and images have something that the source draws and no bucket shows.

    Args:
      shown: (media, kind) of all buckets.

    Returns: the number by (media, kind). Examples of media that have their buckets are not read.
    """
    kinds = {_kind_of_task(task) for task, weight in source.tasks.items() if weight}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for video_id in source.dataset.videos:
        media = source.dataset.video_info(video_id).media
        if unseen := {(media, kind) for kind in kinds} - set(shown):
            counts.update(unseen & {
                (media, kind_of(example)) for example in source.dataset.examples(video_id)
                if any(source.draws(example, turn) for turn in range(len(example.turns)))})
    return dict(sorted(counts.items()))


def _entries(kind: str, video_id: str, draws: list[Draw]) -> list[Entry]:
    """One entry a video, or one a pair."""
    if kind == "preference":
        return [(video_id, [draw]) for draw in draws]
    return [(video_id, draws)] if draws else []


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a stream takes from a source.

    Attributes:
      source: one of those that rows come from.
      share: its share of rows.
      entries: what it has for the bucket: pairs, or videos or images, each with all of its turns.
      rows: how many it gave; above `entries` they repeat.
    """

    source: Source
    share: float
    entries: int
    rows: int

    @property
    def epochs(self) -> float:
        return self.rows / self.entries


class Mixture:
    """The stream of rows of one bucket.

    Args:
      parts: sources with what they have for this bucket, at least one.
      shares: which of them a row comes from.
      seed: decides shuffling and draws.
    """

    def __init__(self, bucket: Bucket, parts: Parts, shares: Shares, seed: int) -> None:
        self.bucket, self.seed = bucket, seed
        self._key = zlib.crc32(bucket.name.encode())
        self._parts, self._shares = parts, shares
        self._epochs = {number: _Epochs(len(entries), [seed, self._key, number])
                        for number, (_, entries) in parts.items()}

    @property
    def entries(self) -> list[list[Entry]]:
        """What each source has for this bucket."""
        return [entries for _, entries in self._parts.values()]

    def drawn_before(self, row: int) -> list[Drawn]:
        """What the rows before `row` took from each of the sources that rows come from now."""
        weights = {n: s.weight for n, s in self._shares.shares.items() if s.weight > 0}
        drawn, whole = self._shares.counts(row), sum(weights.values())
        return [Drawn(self._parts[n][0], w / whole, len(self._parts[n][1]), drawn[n])
                for n, w in weights.items()]

    def __call__(self, row: int) -> RowPlan:
        """The plan of a row of the global stream."""
        number, position = self._shares(row)
        source, entries = self._parts[number]
        video_id, draws = entries[self._epochs[number][position]]
        examples = source.dataset.examples(video_id)
        if self.bucket.kind == "preference":
            return preference_plan(source.dataset, examples[draws[0].example])
        random = np.random.default_rng([self.seed, self._key, position, number])
        return draw_branches(source, video_id, examples, draws, self.bucket, random)


def draw_branches(
    source: Source, video_id: str, examples: Sequence[Example], draws: Sequence[Draw],
    bucket: Bucket, random: np.random.Generator
) -> RowPlan:
    """Up to K turns about one clip, tasks by weight, without replacement until none is left.

    The first draw decides the clip; a turn about another clip or beyond the slot capacity of the
    bucket is passed over, and so is the second form of a turn that was drawn.
    """
    remaining: dict[str, list[Draw]] = {}
    for draw in draws:
        remaining.setdefault(examples[draw.example].task, []).append(draw)
    used: dict[str, int] = {}
    chosen: list[BranchPlan] = []
    asked: set[tuple[int, int]] = set()
    clip: tuple[float, float] | None = None
    while remaining and len(chosen) < bucket.branches:
        task = _weighted(list(remaining), source.tasks, random)
        draw = remaining[task].pop(_index(len(remaining[task]), random))
        if not remaining[task]:
            del remaining[task]
        example, turn = examples[draw.example], draw.turn
        needed = {head: count for head in TASK_TOKENS
                  if (count := _markers(example, turn, head))}
        if (draw.example, turn) in asked or clip not in (None, (example.start, example.end)) or any(
                used.get(head, 0) + count > bucket.capacity(head)
                for head, count in needed.items()):
            continue
        clip = (example.start, example.end)
        asked.add((draw.example, turn))
        used |= {head: used.get(head, 0) + count for head, count in needed.items()}
        chosen.append(BranchPlan(
            example, turn, _question(example, draw, random), example.turns[turn].answer))
    assert clip is not None, f"{video_id} has no turn for bucket {bucket.name}"
    return RowPlan(source.dataset, video_id, *clip, tuple(chosen))


def _markers(example: Example, turn: int, head: str) -> int:
    return marker_count(example, head, turn + 1) - marker_count(example, head, turn)


def _question(example: Example, draw: Draw, random: np.random.Generator) -> str:
    """The question, with its options in a random order where they are shown."""
    question, options = example.turns[draw.turn].question, list(example.turns[draw.turn].options)
    if not draw.options_shown:
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
