"""What a row holds: a video and the branches about it, before anything is tokenised."""

from __future__ import annotations

import dataclasses

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.errors import UserError


class RowError(UserError):
    """An example that does not fit its bucket; names folder, example, bucket, value and fix."""


@dataclasses.dataclass(frozen=True)
class BranchPlan:
    """One branch.

    Attributes:
      example: what it is about.
      turn: index of its turn, which decides the slot targets.
      question: as shown (with options or not), None where it stands in the prefix.
      answer: as trained or scored, None for a prompt.
    """

    example: Example
    turn: int
    question: str | None
    answer: str | None


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """What one row holds.

    Attributes:
      dataset: where the frames are.
      video_id: whose.
      start: seconds, beginning of the clip.
      end: seconds, end of the clip.
      branches: at most K.
      question: in the prefix, preference rows only.
      frame_indices: given frames instead of uniform ones.
    """

    dataset: PreparedDataset
    video_id: str
    start: float
    end: float
    branches: tuple[BranchPlan, ...]
    question: str | None = None
    frame_indices: tuple[int, ...] | None = None


def preference_plan(dataset: PreparedDataset, example: Example) -> RowPlan:
    """The row of a pair: question in the prefix, branches chosen and every rejected answer."""
    targets = example.targets
    rejected = targets.get("rejected")
    answers = {"chosen": [targets.get("chosen")],
               "rejected": rejected if isinstance(rejected, list) else [rejected]}
    for key, texts in answers.items():
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RowError(
                f"{dataset.path}: {example.example_id}: targets.{key}: {targets.get(key)!r}, "
                "expected the text of an answer, or (rejected) a list of such.")
    question = example.turns[0].question
    branches = tuple(BranchPlan(example, 0, None, text)
                     for texts in answers.values() for text in texts)
    indices = targets.get("frame_indices")
    return RowPlan(dataset, example.video_id, example.start, example.end, branches, question,
                   tuple(indices) if indices else None)


def clip_frames(plan: RowPlan) -> int:
    """Frames that a row has to show: those given, else all that are stored of its clip."""
    if plan.frame_indices is not None:
        return len(plan.frame_indices)
    timestamps = plan.dataset.video_info(plan.video_id).timestamps
    return len(sampling.frames_between(timestamps, plan.start, plan.end))
