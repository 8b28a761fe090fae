"""What the rows of a batch ask: clips, calls with their slots, and how a call is recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.rows import RowPlan
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.benchmarks import Call
from tpo_jax.models.heads import ClipInfo


def clip_info(
    dataset: PreparedDataset, plan: RowPlan, batch: Mapping[str, Any], row: int
) -> ClipInfo:
    """What turns predictions about a row into seconds and pixels."""
    info = dataset.video_info(plan.video_id)
    return ClipInfo(
        start=plan.start,
        end=plan.end,
        times=batch["frame_times"][row],
        frame_valid=batch["frame_valid"][row],
        height=info.height,
        width=info.width,
    )


def frames_asked(plans: Sequence[RowPlan], batch: Mapping[str, Any]) -> np.ndarray:
    """int32[B, K, C]: the frames that the regions of a labelled answer are on, in its order.

    An answer with fewer than C repeats its last; 0 where no region is asked about.
    """
    named: dict[tuple[int, int], list[int]] = {}
    for row, plan in enumerate(plans):
        times = np.where(batch["frame_valid"][row], batch["frame_times"][row], np.inf)
        for branch, planned in enumerate(plan.branches):
            calls = benchmarks.find_calls(planned.example, planned.turn)
            targets = [planned.example.targets["times"][call.occurrence]
                       for call in calls if call.head == "region"]
            if targets:
                named[row, branch] = [int(np.argmin(np.abs(times - time))) for time in targets]
    most = max(map(len, named.values()), default=1)
    asked = np.zeros((*batch["branch_tokens"].shape[:2], most), np.int32)
    for place, frames in named.items():
        asked[place] = frames + frames[-1:] * (most - len(frames))
    return asked


def slots_of(plan: RowPlan) -> Iterator[tuple[Call, int, int]]:
    """Each call of a row's labelled answers, with its branch and its slot in the batch."""
    used: dict[str, int] = defaultdict(int)
    for number, branch in enumerate(plan.branches):
        for call in benchmarks.find_calls(branch.example, branch.turn):
            yield call, number, used[call.head]
            used[call.head] += 1


def most_calls(plans: Sequence[RowPlan]) -> int:
    """Of one labelled answer."""
    asked = (branch for plan in plans for branch in plan.branches)
    return max((len(benchmarks.find_calls(b.example, b.turn)) for b in asked), default=0)


def sample(
    task: str, item: str, plan: RowPlan, example: Example, turn: int, scores: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON-able record of one question or call."""
    return {
        "task": task,
        "item": item,
        "video": plan.video_id,
        "example": example.example_id,
        "turn": turn,
        "question": example.turns[turn].question,
        "scores": {metric: round(value, 4) for metric, value in scores.items()},
    }
