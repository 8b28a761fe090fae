"""What each task has in a run: how many of its examples were seen, and its part of the objective.

Two words mean two things. The task of an *example* is what its question asks for (conversation,
temporal, region, mask, tracking, ...). The task of a *loss* is whose it is: `language` for the
words of all answers, else the task that the head answers; masks and tracks are one there.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.data.records import known_tasks
from tpo_jax.models.heads import HEADS
from tpo_jax.parallel.weighted_sum import WeightedSum


def task_of(term: str) -> str:
    """The task of a loss: "cg_detr/l1" -> "temporal", "language" -> "language"."""
    owner = term.split("/")[0]
    return HEADS[owner].task if owner in HEADS else owner


def tasks_of(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The tasks of all losses that count, in the order of their first term."""
    return tuple(dict.fromkeys(task_of(term) for term, weight in weights.items() if weight))


def count_examples(batch: Mapping[str, Any]) -> jax.Array:
    """int32[number of known tasks]: branches of each task in a global batch; a pair counts once."""
    wanted = jnp.arange(1, len(known_tasks()) + 1)
    return jnp.sum(batch["branch_tasks"].reshape(-1, 1) == wanted, axis=0, dtype=jnp.int32)


def add_examples(seen: Mapping[str, int], counts: np.ndarray) -> dict[str, int]:
    """What was seen so far (JSON, of a checkpoint) and the `count_examples` of one step more."""
    new = dict(zip(known_tasks(), map(int, counts), strict=True))
    return {t: seen.get(t, 0) + new.get(t, 0) for t in {**seen, **new} if t in seen or new[t]}


def example_scalars(seen: Mapping[str, int]) -> dict[str, int]:
    """What `add_examples` counted, as scalars of metrics.jsonl."""
    return {f"train/examples/{task}": count for task, count in seen.items()}


def objective_parts(
    weights: Mapping[str, float], weighted: Mapping[str, jax.Array]
) -> dict[str, WeightedSum]:
    """{"objective/<term>", "objective/<task>": its part of one step's loss}.

    The parts of tasks add up to the loss, those of a task's terms to the task.

    Args:
      weights: of the objective.
      weighted: {term: float32[]} weight x mean; a term of weight 0 has none, and one that had no
        place in the step counts 0.
    """
    zero = jnp.zeros((), jnp.float32)
    terms = {term: weighted.get(term, zero) for term, weight in weights.items() if weight}
    tasks = {task: _sum(v for t, v in terms.items() if task_of(t) == task)
             for task in tasks_of(weights)}  # fmt: skip
    one = jnp.ones((), jnp.float32)
    return {f"objective/{name}": WeightedSum(v, one) for name, v in {**terms, **tasks}.items()}


def _sum(values: Iterable[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(list(values)))
