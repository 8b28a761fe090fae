"""When a checkpoint is written, and which of the older ones stay.

Kinds of a save (one checkpoint can be of several):
  step        every `every` steps and at the end; the newest `keep` of them stay
  permanent   every `permanent` steps; all of them stay
  best        after a validation that is among the `best` lowest validation losses; those stay
  time        `minutes` after the save before it
  preemption  told to stop
  local       every `local_every` steps, on the hosts (training.local_checkpoints)
The newest checkpoint stays whatever its kind; those of time and preemption go with the next one.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SavePolicy:
    """config.checkpoint; 0 turns `permanent`, `minutes`, `best` and `local_every` off."""

    every: int
    keep: int
    permanent: int = 0
    minutes: float = 0.0
    best: int = 0
    local_dir: str = ""
    local_every: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"checkpoint.keep={self.keep}: at least one checkpoint must be kept")
        if bool(self.local_dir) != bool(self.local_every):
            raise UserError(
                f"checkpoint.local_dir={self.local_dir!r}, "
                f"checkpoint.local_every={self.local_every}: one without the other; give a folder "
                "and the steps between two saves, or neither"
            )
        if "://" in self.local_dir:
            raise UserError(
                f"checkpoint.local_dir={self.local_dir!r}: not on the host; give a folder on its "
                "disk or in its memory"
            )

    def retained(self, saves: Mapping[int, "Save"]) -> set[int]:
        """Steps that stay, of those in `saves`."""
        steps = sorted(saves)
        regular = [step for step in steps if "step" in saves[step].kinds]
        losses = sorted(
            (saves[step].loss, step) for step in steps if "best" in saves[step].kinds
        )
        return {
            *steps[-1:],
            *regular[-self.keep :],
            *(step for step in steps if "permanent" in saves[step].kinds),
            *(step for _, step in losses[: self.best]),
        }


@dataclasses.dataclass(frozen=True)
class Save:
    """Why a checkpoint was written, and its validation loss if it was evaluated at that step."""

    kinds: tuple[str, ...]
    loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kinds": list(self.kinds), "loss": self.loss}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Save":
        return cls(tuple(saved["kinds"]), saved["loss"])


class Due:
    """Says which kinds of save are due; one for each run of the loop.

    Args:
      losses: validation losses of the best checkpoints so far, from a checkpoint's progress.
    """

    def __init__(
        self,
        policy: SavePolicy,
        losses: Sequence[float] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._clock = policy, clock
        self._last = clock()
        self.losses = sorted(losses)

    def at(
        self, step: int, *, fresh: bool, loss: float | None, last: bool, told: bool, poll: bool
    ) -> Save:
        """What is due now; a Save without kinds is none.

        Args:
          step: steps done.
          fresh: whether a step was done since the start.
          loss: validation loss, if the state of this step was evaluated just now.
          last: whether the run ends here.
          told: whether the run was told to stop.
          poll: whether to look at the clock (with several processes that is a round trip).
        """
        policy = self._policy
        kinds = []
        if last or (fresh and step % policy.every == 0):
            kinds.append("step")
        if fresh and policy.permanent and step % policy.permanent == 0:
            kinds.append("permanent")
        if policy.best and loss is not None and fresh:
            self.losses = sorted([*self.losses, loss])[: policy.best]
            if loss in self.losses:
                kinds.append("best")
        if told:
            kinds.append("preemption")
        if policy.minutes and poll and not kinds:
            if _agree(self._clock() - self._last >= 60 * policy.minutes):
                kinds.append("time")
        if kinds:
            self._last = self._clock()
        if policy.local_every and fresh and step % policy.local_every == 0:
            kinds.append("local")
        return Save(tuple(kinds), loss)


def _agree(answer: bool) -> bool:
    """The answer of process 0, whose clock decides, on every process."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))
