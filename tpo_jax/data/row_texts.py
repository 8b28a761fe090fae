"""Text features (data/text_features.py) in rows: which questions need them, and where they go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpo_jax.data.problems import Invalid, differs
from tpo_jax.data.row_plans import BranchPlan, RowPlan
from tpo_jax.models.config import TextFeaturesConfig


@dataclasses.dataclass(frozen=True)
class RowTexts:
    """The text features of rows, for a model with a head that reads them.

    Attributes:
      about: what the head reads.
      tasks: that such heads answer.
    """

    about: TextFeaturesConfig
    tasks: frozenset[str]

    def blank(self, branches: int) -> dict[str, np.ndarray]:
        """text_features float32[K, tokens, width] and text_valid bool[K, tokens] of a row."""
        shape = (branches, self.about.tokens)
        return {"text_features": np.zeros((*shape, self.about.width), np.float32),
                "text_valid": np.zeros(shape, bool)}  # fmt: skip

    def check(self, plan: RowPlan) -> None:
        """Raises Invalid where a head would read what is not there, or what is of another kind.

        Branches whose answers are given and call no such head need none, nor do images.
        """
        if plan.dataset.video_info(plan.video_id).media == "image":
            return
        texts = plan.dataset.texts
        again = "prepare it again with --features=FOLDER"
        if texts is not None and (difference := differs(texts.about, self.about)):
            field, value, reason = difference
            fix = f"{again} of that encoder, or train the head on these (config.text_features=True)"
            raise Invalid(f"text_features.{field}", value, reason, fix)
        for branch in plan.branches:
            if self._reads(branch) and not self._has(plan, branch):
                reason = f"none of this question, but a head of the model reads {self.about}"
                raise Invalid("text_features", _question(branch), reason, again)

    def fill(self, row: Mapping[str, Any], plan: RowPlan) -> None:
        """Into the arrays of `blank`; a question that has none and needs none stays blank."""
        for k, branch in enumerate(plan.branches):
            if self._has(plan, branch):
                states = plan.dataset.texts.read(plan.video_id, _question(branch))
                row["text_features"][k, : len(states)] = states
                row["text_valid"][k, : len(states)] = True

    def _has(self, plan: RowPlan, branch: BranchPlan) -> bool:
        texts = plan.dataset.texts
        return texts is not None and texts.has(plan.video_id, _question(branch))

    def _reads(self, branch: BranchPlan) -> bool:
        answer = branch.answer
        return answer is None or any(f"<{task}>" in answer for task in self.tasks)


def _question(branch: BranchPlan) -> str:
    """As its example has it: without options, wherever it stands."""
    return branch.example.turns[branch.turn].question
