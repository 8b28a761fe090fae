"""Where the wall-clock time of a run went, across restarts (goodput).

Categories, in seconds:
  init        start of the command to the first compile: processes, data index, weights, restore
  compile     compiling every bucket
  data_wait   the loop waiting for a batch
  step        the device training (the loop waits for results one step late)
  evaluation  validation batches and writing the best model
  checkpoint  the loop blocked by a save (the write itself runs beside the training)
  restart     lost: from the checkpoint that was restored to the start of the process that restored
              it (work done twice, and the time in the queue), or to the roll-back to it
  other       everything else (writing metrics)
Goodput = step / sum of all.

Model FLOPs are counted analytically (training.flops) for every step that stays. MFU is their rate
during `step`, over the peak of the devices; where the peak is not known there is none.
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
        self._flops = 0.0
        self._saves = {"count": 0, "blocked": 0.0, "longest": 0.0}
        self._last_save = 0.0

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

    def count_step(self, flops: float) -> None:
        """A step is done that takes so many model FLOPs."""
        self._flops += flops

    @contextlib.contextmanager
    def measure_save(self, again: bool = False) -> Iterator[None]:
        """`measure("checkpoint")` of one save, which is counted by itself as well.

        Args:
          again: it is the last save that blocks once more.
        """
        with self.measure("checkpoint"):
            before = self.seconds()["checkpoint"]
            yield
            blocked = self.seconds()["checkpoint"] - before
        self._last_save = blocked + (self._last_save if again else 0.0)
        self._saves["count"] += not again
        self._saves["blocked"] += blocked
        self._saves["longest"] = max(self._saves["longest"], self._last_save)

    @property
    def saves(self) -> dict[str, float]:
        """Saves so far: count, and for how many seconds they blocked the loop (sum, longest)."""
        return dict(self._saves)

    @property
    def model_flops(self) -> float:
        """Model FLOPs of all steps that count."""
        return self._flops

    def mfu(self, peak: float | None) -> float | None:
        """Model FLOPs a second of stepping, over `peak` of all devices; None without a peak."""
        step = self.seconds()["step"]
        return self._flops / step / peak if peak and step else None

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {
            "seconds": self.seconds(), "restarts": self._restarts, "time": self._clock(),
            "flops": self._flops, "saves": dict(self._saves),
        }  # fmt: skip

    def resume(self, saved: dict[str, Any]) -> None:
        """Adds the history in a checkpoint; the gap between it and our start is lost time."""
        for category, seconds in saved["seconds"].items():
            self._seconds[category] += seconds
        self._seconds["restart"] += max(self._start - saved["time"], 0.0)
        self._restarts += saved["restarts"] + 1
        self._flops += saved["flops"]
        for name in ("count", "blocked"):
            self._saves[name] += saved["saves"][name]
        self._saves["longest"] = max(self._saves["longest"], saved["saves"]["longest"])

    def roll_back(self, saved: dict[str, Any]) -> None:
        """Goes back to a checkpoint of this process: all time since then is lost time."""
        lost = sum(self.seconds().values()) - sum(saved["seconds"].values())
        self._seconds = dict(saved["seconds"])
        self._seconds["restart"] += lost
        self._flops = saved["flops"]

    def summary(self) -> str:
        """One line for the console: `goodput 91% | step 100.0 s | ...`, largest first."""
        seconds = self.seconds()
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        listed = " | ".join(f"{name} {value:.1f} s" for name, value in parts if value >= 0.05)
        return f"goodput {self.goodput():.0%} | {listed} | restarts {self._restarts}"
