"""Rates of the loop, from the ledger."""

import time

from tpo_jax.training.ledger import Ledger


class Clock:
    """Rates since the last record; `peak` is the FLOP/s of all devices, if it is known."""

    def __init__(self, ledger: Ledger, step: int, peak: float | None) -> None:
        self._ledger, self._peak = ledger, peak
        self._last = (time.monotonic(), step, 0, ledger.seconds(), ledger.model_flops)

    def record(self, step: int, tokens: int) -> dict[str, float]:
        """Scalars of the steps since the last record; `tokens` counts from the start."""
        now, seconds = time.monotonic(), self._ledger.seconds()
        flops = self._ledger.model_flops
        then, last_step, last_tokens, last_seconds, last_flops = self._last
        self._last = (now, step, tokens, seconds, flops)
        # Validation and saves are not the loop's speed.
        loop = ("data_wait", "step", "other")
        spent = max(sum(seconds[name] - last_seconds[name] for name in loop), 1e-9)
        flops_per_second = (flops - last_flops) / spent
        mfu = {"time/mfu": flops_per_second / self._peak} if self._peak else {}
        return mfu | {
            "time/model_tflops_per_second": flops_per_second / 1e12,
            "time/steps_per_second": (step - last_step) / spent,
            "time/tokens_per_second": (tokens - last_tokens) / spent,
            "time/data_wait_share": (seconds["data_wait"] - last_seconds["data_wait"]) / spent,
            "time/wall_seconds": now - then,
            "time/goodput": self._ledger.goodput(),
        }
