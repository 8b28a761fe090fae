"""Where the wall-clock time of a run went, across restarts (goodput).

Categories, in seconds:
  init        start of the command to the first compile: processes, data index, weights, restore
  compile     compiling every bucket
  data_wait   the loop waiting for a batch
  step        the device training (the loop waits for results one step late)
  evaluation  validation batches and writing the best model
  checkpoint  the loop blocked by a save (the write itself runs beside the training)
  restart     lost to a restart: from the checkpoint that was restored to the start of the process
              that restored it (work done twice, and the time in the queue)
  other       everything else (writing metrics)
Goodput = step / sum of all.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

CATEGORIES = (
    "init", "compile", "data_wait", "step", "evaluation", "checkpoint", "restart", "other",
)  # fmt: skip


class Ledger:
    """Attributes every second since its creation to one category.

    `clock` gives seconds since the epoch (so that times of two processes compare).
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._start = self._mark = clock()
        self._current = "other"
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._restarts = 0

    @contextlib.contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Attributes the time inside to `category`; an inner `measure` pauses the outer one."""
        if category not in CATEGORIES:
            raise ValueError(f"ledger category {category!r}: one of {', '.join(CATEGORIES)}")
        outer = self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, category: str) -> str:
        now = self._clock()
        self._seconds[self._current] += now - self._mark
        previous, self._current, self._mark = self._current, category, now
        return previous

    def seconds(self) -> dict[str, float]:
        """Seconds by category up to now, all processes of this run added up."""
        self._switch(self._current)
        return dict(self._seconds)

    def goodput(self) -> float:
        """Share of all time that the devices trained, in [0, 1]."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    @property
    def restarts(self) -> int:
        return self._restarts

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {"seconds": self.seconds(), "restarts": self._restarts, "time": self._clock()}

    def resume(self, saved: dict[str, Any]) -> None:
        """Adds the history in a checkpoint; the gap between it and our start is lost time."""
        for category, seconds in saved["seconds"].items():
            self._seconds[category] += seconds
        self._seconds["restart"] += max(self._start - saved["time"], 0.0)
        self._restarts += saved["restarts"] + 1

    def summary(self) -> str:
        """One line for the console: `goodput 91% | step 100.0 s | ...`, largest first."""
        seconds = self.seconds()
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        listed = " | ".join(f"{name} {value:.1f} s" for name, value in parts if value >= 0.05)
        return f"goodput {self.goodput():.0%} | {listed} | restarts {self._restarts}"
