"""Rows for evaluation and scoring: every question or pair once, in order, in fixed shapes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.row_plans import preference_plan
from tpo_jax.data.rows import (
    BranchPlan,
    RowBuilder,
    RowError,
    RowPlan,
    marker_count,
    row_id,
    stack_rows,
)
from tpo_jax.data.text import render_options


def media_of(dataset: PreparedDataset) -> list[str]:
    """What a folder holds: "image", "video" or both."""
    return sorted({dataset.video_info(video).media for video in dataset.videos})


def examples_of(dataset: PreparedDataset, media: str) -> Iterator[Example]:
    """The examples about videos, or about images."""
    for video in dataset.videos:
        if dataset.video_info(video).media == media:
            yield from dataset.examples(video)


def count_unlabelled(dataset: PreparedDataset, tasks: Sequence[str]) -> dict[str, int]:
    """{task: examples without labels}, of those of some tasks that have any."""
    found = (example for video in dataset.videos for example in dataset.examples(video))
    return dict(Counter(e.task for e in found if e.task in tasks and not e.labelled))


@dataclasses.dataclass(frozen=True)
class OptionBranch:
    """Which option of which question a branch scores."""

    example_id: str
    turn: int
    option: int
    correct: bool
    kind: str


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """A row of options; `branches` runs parallel to `plan.branches`."""

    plan: RowPlan
    branches: tuple[OptionBranch, ...]

    @property
    def questions(self) -> list[list[int]]:
        """Numbers of the branches of each question, in order."""
        found: dict[tuple[str, int], list[int]] = {}
        for number, branch in enumerate(self.branches):
            found.setdefault((branch.example_id, branch.turn), []).append(number)
        return list(found.values())


def share_prompts(batch: dict[str, Any], rows: Sequence[OptionRow], shape: tuple[int, int]
                  ) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Each question of a batch of option rows once, and apart from it what may follow.

    Args:
      batch: built from `rows`, which may be fewer than B.
      shape: Q and O, at least the most questions of a row and the most options of a question.

    Returns:
      The branch arrays of prompts [B, Q, R]; answers {"tokens": int32[B, Q, O, A], "weights":
      float32[B, Q, O, A]}; and int64[B, Q, O], the branch of each option, -1 for none.
    """
    branch = np.full((len(batch["branch_tokens"]), *shape), -1)
    for number, row in enumerate(rows):
        for question, numbers in enumerate(row.questions):
            branch[number, question, : len(numbers)] = numbers
    row = np.arange(len(branch))[:, None]
    first, each = np.maximum(branch[..., 0], 0), np.maximum(branch, 0)
    # A prompt ends at the token that the first answer token is predicted from.
    ends = batch["answer_positions"][row, first][..., :1]
    asked = (np.arange(batch["branch_tokens"].shape[-1]) <= ends) & (branch[..., :1] >= 0)
    prompts = {name: np.where(asked, batch[name][row, first], 0)
               for name in ("branch_tokens", "branch_positions", "branch_segments")}
    answers = {name: batch[f"answer_{name}"][row[..., None], each]
               for name in ("tokens", "weights")}
    return prompts | {"slots": batch["slots"]}, answers, branch


Question = tuple[Example, int]  # example and index of its turn


def _by_clip(dataset: PreparedDataset, media: str, wanted: Callable[[Example, int], bool]
             ) -> Iterator[list[Question]]:
    """The wanted turns of every video of a media, those about one clip together."""
    for video_id in dataset.videos:
        if dataset.video_info(video_id).media != media:
            continue
        clips: dict[tuple[float, float], list[Question]] = {}
        for example in dataset.examples(video_id):
            for turn in range(len(example.turns)):
                if wanted(example, turn):
                    clips.setdefault((example.start, example.end), []).append((example, turn))
        yield from clips.values()


def build_option_rows(dataset: PreparedDataset, builder: RowBuilder,
                      show_options: bool = True) -> list[OptionRow]:
    """Every multiple-choice question with all its options as branches, several questions a row.

    Args:
      dataset: one split.
      builder: its bucket decides media and K, which must hold the options of a question.
      show_options: also write the options, in their stored order, into the question.
    """
    capacity = builder.bucket.branches
    rows = []
    for questions in _by_clip(dataset, builder.bucket.media,
                              lambda example, turn: bool(example.turns[turn].options)):
        group: list[Question] = []
        for example, turn in questions:
            count = len(example.turns[turn].options)
            if count > capacity:
                raise RowError(
                    f"{dataset.path}: example {example.example_id!r}, turn {turn}: {count} "
                    f"options, but bucket {builder.bucket.name!r} has branches = {capacity}.")
            if sum(len(e.turns[t].options) for e, t in group) + count > capacity:
                rows.append(_option_row(dataset, group, show_options))
                group = []
            group.append((example, turn))
        rows.append(_option_row(dataset, group, show_options))
    return rows


def _option_row(dataset: PreparedDataset, group: Sequence[Question],
                show_options: bool) -> OptionRow:
    branches, options = [], []
    for example, i in group:
        turn = example.turns[i]
        if turn.answer not in turn.options:
            raise RowError(
                f"{dataset.path}: example {example.example_id!r}, turn {i}: answer {turn.answer!r} "
                f"is not one of the options {list(turn.options)}.")
        question = render_options(turn.question, turn.options) if show_options else turn.question
        for number, option in enumerate(turn.options):
            branches.append(BranchPlan(example, i, question, option))
            options.append(OptionBranch(
                example.example_id, i, number, option == turn.answer, turn.kind))
    example = group[0][0]
    plan = RowPlan(dataset, example.video_id, example.start, example.end, tuple(branches))
    return OptionRow(plan, tuple(options))


def build_question_rows(dataset: PreparedDataset, builder: RowBuilder, tasks: Sequence[str],
                        with_answers: bool) -> list[RowPlan]:
    """Every turn of some tasks once, up to K a row.

    Args:
      dataset: one split.
      builder: its bucket decides media, K and slot capacities.
      tasks: which examples.
      with_answers: False gives prompts for free generation; True gives forced answers (and slots).
    """
    bucket, rows = builder.bucket, []
    for questions in _by_clip(dataset, bucket.media, lambda example, _: example.task in tasks):
        group: list[BranchPlan] = []
        used: dict[str, int] = {}
        for example, i in questions:
            needed = {head: marker_count(example, head, i + 1) - marker_count(example, head, i)
                      for head in builder.slot_heads}
            full = any(used.get(head, 0) + n > bucket.capacity(head) for head, n in needed.items())
            if group and (full or len(group) == bucket.branches):
                rows.append(_row(dataset, group))
                group, used = [], {}
            used = {head: used.get(head, 0) + n for head, n in needed.items()}
            turn = example.turns[i]
            group.append(BranchPlan(
                example, i, turn.question, turn.answer if with_answers else None))
        rows.append(_row(dataset, group))
    return rows


def _row(dataset: PreparedDataset, group: Sequence[BranchPlan]) -> RowPlan:
    example = group[0].example
    return RowPlan(dataset, example.video_id, example.start, example.end, tuple(group))


def build_pair_rows(dataset: PreparedDataset) -> list[RowPlan]:
    """Every preference pair once, one a row."""
    return [preference_plan(dataset, example) for video_id in dataset.videos
            for example in dataset.examples(video_id) if example.task == "preference"]


def batches(builder: RowBuilder, plans: Sequence[RowPlan], process_index: int = 0,
            process_count: int = 1) -> Iterator[tuple[dict[str, Any], list[RowPlan]]]:
    """Batches of plans in order; blank rows fill the last one.

    Yields:
      This host's rows of a batch, and the plans of those that are not blank. Every host sees the
      same number of batches.
    """
    size = builder.bucket.batch_size
    if size % process_count:
        raise ValueError(f"buckets.{builder.bucket.name}.batch_size: {size} rows do not divide "
                         f"over {process_count} hosts.")
    local = size // process_count
    for first in range(0, len(plans), size):
        start = first + process_index * local
        mine = list(plans[start : min(start + local, first + size)])
        rows = [builder.build(plan, row_id(builder.bucket.name, start + i))
                for i, plan in enumerate(mine)]
        rows += [builder.blank()] * (local - len(rows))
        yield stack_rows(rows), mine
