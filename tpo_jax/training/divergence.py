"""The divergence guard: what to do about a step whose loss is not finite or leaps.

The loss of a step is compared with the median of the last finite ones of its bucket. A step that
fails is written to <workdir>/divergence/step_<n>.json with the examples of its batch and the norm
of the gradient by parameter; with `rollbacks` left, the run goes back to its last checkpoint and
skips those examples from there on.
"""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from tpo_jax.errors import UserError

HISTORY, ENOUGH = 64, 16  # losses kept a bucket, and how many make a median


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A step that failed: step (after which it is counted), loss, and why in words."""

    step: int
    loss: float
    reason: str


class Guard:
    """Judges losses one after the other; its state belongs into the checkpoint.

    Args:
      spike: a loss above `spike` times the median fails; 0: only one that is not finite.
      saved: `state()` of the run that is continued.
    """

    def __init__(self, spike: float, saved: Mapping[str, list[float]] | None = None) -> None:
        self._spike = spike
        self._losses = {
            name: collections.deque(losses, HISTORY) for name, losses in (saved or {}).items()
        }

    def state(self) -> dict[str, list[float]]:
        """JSON: recent losses by bucket."""
        return {name: list(losses) for name, losses in self._losses.items()}

    def judge(self, step: int, bucket: str, loss: float, finite: bool) -> Divergence | None:
        """None for a loss that is as losses were; it counts for the next ones."""
        losses = self._losses.setdefault(bucket, collections.deque(maxlen=HISTORY))
        if not finite:
            return Divergence(step, loss, "loss or gradient is not finite")
        if self._spike and len(losses) >= ENOUGH:
            median = statistics.median(losses)
            if loss > self._spike * median > 0:
                return Divergence(
                    step, loss, f"loss is {loss / median:.1f} times the median {median:.4g} of "
                    f"the last {len(losses)} of bucket {bucket!r}"
                )  # fmt: skip
        losses.append(loss)
        return None


class NothingFinite(UserError, FloatingPointError):
    """A run that changes nothing any more."""


def check_finite(step: int, scalars: dict[str, float], workdir: epath.Path) -> None:
    """Stops a run of which nothing is left: no finite step since the last record."""
    if scalars["train/nonfinite"] == 1.0:
        raise NothingFinite(
            f"step {step}: no step since the last record had a finite loss and gradient "
            f"({workdir}/divergence/ has their examples and norms); lower the learning rates "
            "(config.trainable) or raise config.optimizer.warmup, in another --workdir"
        )


def write_report(
    workdir: epath.Path,
    found: Divergence,
    bucket: str,
    rows: Sequence[Mapping[str, Any]],
    norms: Mapping[str, float],
) -> epath.Path:
    """Writes divergence/step_<n>.json on process 0; returns its path.

    Args:
      rows: video and examples of every row of the global batch.
      norms: norm of the gradient by path, before clipping; the largest, or not finite, come first.
    """
    finite = {path: value for path, value in norms.items() if math.isfinite(value)}
    order = [path for path in norms if path not in finite]
    order += sorted(finite, key=lambda path: -finite[path])
    content = {
        "step": found.step,
        "reason": found.reason,
        "loss": _number(found.loss),
        "bucket": bucket,
        "rows": list(rows),
        "grad_norms": {path: _number(norms[path]) for path in order},
    }
    file = workdir / "divergence" / f"step_{found.step}.json"
    if jax.process_index() == 0:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")
    return file


def rolled_back(
    restored: dict[str, Any], current: dict[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The progress of a checkpoint that the run goes back to, with one more batch to skip."""
    examples = {name for row in rows for name in row["examples"]}
    skipped = sorted(examples.union(current["skipped"]))
    # best_model stays as it is, and so does what is known about it.
    kept = {"best": current["best"], "rollbacks": current["rollbacks"] + 1}
    return restored | kept | {"skipped": skipped}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # JSON has no NaN
