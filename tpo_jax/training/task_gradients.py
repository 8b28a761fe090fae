"""How large the gradient of each task is, measured on one micro-batch now and then.

The gradient of a step is the sum of the gradients of its tasks, from which their sizes cannot be
told: an exact answer is one forward and backward pass for every task. So this is a program of its
own, which `config.task_gradients_every` steps apart takes the first micro-batch of a step, before
the step's update, and with the step's own dropout.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.objective import Batch, Objective, Sums, denominators
from tpo_jax.training.optimizer import Optimizer
from tpo_jax.training.state import merge, partition
from tpo_jax.training.step import added, parts_of, row_keys, weighted_terms
from tpo_jax.training.tasks import task_of, tasks_of

# (params, step, batch, base_key) -> metrics
TaskGradients = Callable[[Any, jax.Array, Batch, jax.Array], Sums]


def make_task_gradients(
    functional_model: Any,
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    dropout: bool = False,
) -> TaskGradients:
    """Arguments as of `step.make_gradient_step`.

    Returns:
      (params, step, batch, base_key) -> for every task of the objective
        gradient_norm/<task>: norm over all trainable parameters of the gradient of the task's part
          of the loss, as weighted, before clipping;
        gradient_share/<task>: that norm over the sum of all tasks' norms;
        shared_gradient_share/<task>: the same of the parameters that are not one head's own.
      Shares have weight 0 where all norms are 0. The memory is that of a gradient step: tasks come
      one after the other, and only norms are kept.
    """
    trainable_paths = frozenset(optimizer.learning_rates)
    tasks = tasks_of(objective.weights)
    own = tuple(f"heads/{name}/" for name in functional_model.config.heads)

    def task_loss(
        trainable: Any, frozen: Any, batch: Batch, keys: Any, weights: Any, chosen: jax.Array
    ) -> jax.Array:
        model = functional_model.bind(merge(trainable, frozen))
        terms = objective.terms(objective.predict(model, batch, keys), batch)
        weighted = weighted_terms(objective, terms, weights)
        return sum(chosen[tasks.index(task_of(name))] * value for name, value in weighted.items())

    def task_gradients(params: Any, step: jax.Array, batch: Batch, base_key: jax.Array) -> Sums:
        trainable, frozen = partition(params, trainable_paths)
        micros = [first_micro_batch(part, accumulation) for part in parts_of(batch)]
        parts = [
            (part, row_keys(base_key, step, part["example_ids"]) if dropout else None)
            for part in micros
        ]
        weights = None  # the micro-batch is all there is
        if len(parts) > 1:
            weights = added([denominators(objective, functional_model, params, *p) for p in parts])

        def squares(chosen: jax.Array) -> jax.Array:
            """float32[2]: squared norm over all trainable parameters, and over shared ones."""
            grads = [jax.grad(task_loss)(trainable, frozen, *part, weights, chosen)
                     for part in parts]  # fmt: skip
            leaves = flatten(added(grads))
            found = {p: jnp.sum(jnp.square(g.astype(jnp.float32))) for p, g in leaves.items()}
            zero = jnp.zeros((), jnp.float32)
            shared = sum((v for p, v in found.items() if not p.startswith(own)), zero)
            return jnp.stack([sum(found.values(), zero), shared])

        norms = jnp.sqrt(jax.lax.map(squares, jnp.eye(len(tasks))))
        return _metrics(tasks, norms[:, 0], norms[:, 1])

    return task_gradients


def first_micro_batch(rows: Any, count: int) -> Any:
    """Rows 0, count, 2 count, ...: the first micro-batch of `step.accumulate`."""
    return jax.tree.map(lambda x: x[::count], rows)


def _metrics(tasks: tuple[str, ...], norms: jax.Array, shared: jax.Array) -> Sums:
    """float32[tasks] each -> metrics of one measurement."""
    metrics = {f"gradient_norm/{t}": WeightedSum(norms[i], jnp.float32(1.0))
               for i, t in enumerate(tasks)}  # fmt: skip
    for name, values in (("gradient_share", norms), ("shared_gradient_share", shared)):
        total = jnp.sum(values)
        shares = values / jnp.where(total == 0, 1.0, total)
        known = (total != 0).astype(jnp.float32)
        metrics |= {f"{name}/{t}": WeightedSum(shares[i], known) for i, t in enumerate(tasks)}
    return metrics
