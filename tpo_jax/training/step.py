"""Train, evaluation and scoring steps: pure functions of pytrees, and how they are jitted.

A train step is two programs: the gradient of one bucket's batch, and the update, which does not
depend on the batch and so is compiled once for all buckets.

    gradient_step = make_gradient_step(functional_model, objective, optimizer, accumulation=4)
    update_step = make_update_step(optimizer)
    gradients, sums = gradient_step(state, batch, base_key)
    state, metrics = update_step(state, gradients, sums["loss"])

The total is sum over terms of weights[term] * (sum of the term / weight of the term), where both
sums run over the whole global batch: micro-batches, packing and devices do not change it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tpo_jax.errors import UserError
from tpo_jax.parallel.mesh import batch_sharding, on_mesh, replicated
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.moments import to_device
from tpo_jax.training.objective import (
    Batch,
    Objective,
    Sums,
    answer_scores,
    contrast_batch,
    denominators,
)
from tpo_jax.training.optimizer import Optimizer, learning_rate
from tpo_jax.training.state import TrainState, merge, partition
from tpo_jax.training.tasks import count_examples, objective_parts

GradientStep = Callable[[TrainState, Batch, jax.Array], tuple[Any, Sums]]
UpdateStep = Callable[[TrainState, Any, WeightedSum], tuple[TrainState, Sums]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """(state, batch, base_key) -> (state, metrics): the two programs, one after the other.

    `before_update` is called with the gradients, perhaps not yet computed, while the old state is
    still there: the update takes over its memory.
    """

    gradient: GradientStep
    update: UpdateStep

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        base_key: jax.Array,
        before_update: Callable[[Any], None] = lambda gradients: None,
    ) -> tuple[TrainState, Sums]:
        """The state after the step, and its metrics; base_key key[] is the run's."""
        gradients, sums = self.gradient(state, batch, base_key)
        before_update(gradients)
        state, metrics = self.update(state, gradients, sums["loss"])
        return state, sums | metrics


def row_keys(base_key: jax.Array, step: jax.Array, example_ids: jax.Array) -> jax.Array:
    """key[B]: fold_in(fold_in(base_key, step), example_id).

    A row's dropout depends on the seed, the step and the example, not on where the row lies.
    """
    step_key = jax.random.fold_in(base_key, step)
    return jax.vmap(lambda example_id: jax.random.fold_in(step_key, example_id))(example_ids)


def make_gradient_step(
    functional_model: Any,
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    dropout: bool = False,
) -> GradientStep:
    """The function of a bucket that `train` runs and `plan` compiles.

    Args:
      functional_model: models.FunctionalModel.
      objective: SftObjective or PreferenceObjective.
      optimizer: from make_optimizer; its learning_rates name the trainable parameters.
      accumulation: micro-batches a step; must divide the rows of a batch.
      dropout: whether rows get dropout keys.

    Returns:
      (state, batch, base_key) -> (float32 gradients of the trainable parameters, sums). Sums are
      WeightedSums that add up over steps: every term by name, the objective's metrics, loss (the
      weighted total) and its parts (`tasks.objective_parts`). Beside them, examples is what
      `tasks.count_examples` gives.
    """
    trainable_paths = frozenset(optimizer.learning_rates)
    if accumulation > 1:
        fix = "set config.accumulation=1 (a smaller batch_size, or more devices)"
        _refuse_coupled(objective, f"accumulation={accumulation}", fix)

    def micro_loss(
        trainable: Any, frozen: Any, batch: Batch, keys: jax.Array | None, weights: Any
    ) -> tuple[jax.Array, Sums]:
        model = functional_model.bind(merge(trainable, frozen))
        predictions = objective.predict(model, batch, keys)
        terms = objective.terms(predictions, batch)
        total = sum(weighted_terms(objective, terms, weights).values())
        return total, terms | objective.metrics(predictions, batch)

    gradient = jax.value_and_grad(micro_loss, has_aux=True)

    def gradient_step(state: TrainState, batch: Batch, base_key: jax.Array) -> tuple[Any, Sums]:
        if "beside" in batch:
            fix = 'set config.buckets.*.beside="", which gives each bucket steps of its own'
            _refuse_coupled(objective, "a second batch in the step", fix)
        trainable, frozen = partition(state.params, trainable_paths)
        parts = [
            (part, row_keys(base_key, state.step, part["example_ids"]) if dropout else None)
            for part in parts_of(batch)
        ]
        weights = None
        # Every micro-batch and every part divides by the weight of the whole batch.
        if accumulation > 1 or len(parts) > 1:
            weights = added([
                denominators(objective, functional_model, state.params, *part) for part in parts
            ])

        def one(micro: tuple[Batch, jax.Array | None]) -> Any:
            value, grads = gradient(trainable, frozen, *micro, weights)
            return value, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        (loss, sums), grads = added([accumulate(one, part, accumulation) for part in parts])
        weighted = weighted_terms(objective, {n: sums[n] for n in objective.weights if n in sums})
        counts = added([count_examples(part) for part, _ in parts])
        more = {"loss": _once(loss), "examples": counts}
        return grads, sums | objective_parts(objective.weights, weighted) | more

    return gradient_step


def _refuse_coupled(objective: Objective, what: str, fix: str) -> None:
    """Raises ValueError where an objective has terms that a batch in parts would change."""
    # Asked by getattr: an objective without coupled terms need not say so.
    if coupled := getattr(objective, "coupled", ()):
        raise UserError(
            f"{what} would change {', '.join(coupled)}, which compares the pairs of a whole batch; "
            f"{fix} or use a loss that is not coupled"
        )


def weighted_terms(
    objective: Objective, terms: Sums, weights: Mapping[str, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """{term: float32[]}, which add up to the loss; a term that is only reported is not there, and
    so has no backward pass.

    Args:
      weights: {term: float32[]} that the terms are divided by; None: their own, of a whole batch.
    """
    return {
        name: objective.weights[name]
        * (term if weights is None else WeightedSum(term.total, weights[name])).mean()
        for name, term in terms.items()
        if objective.weights[name]
    }


def make_update_step(optimizer: Optimizer) -> UpdateStep:
    """Moves the trainable parameters.

    Returns:
      (state, gradients, loss) -> (state, metrics). Metrics are WeightedSums: grad_norm (before
      clipping), learning_rate, and nonfinite: 1 for a step whose loss or gradient is not finite.
      Such a step changes neither parameters nor optimizer state, it only counts. Beside them,
      grad_norms is float32[number of trainable leaves], in the order of their sorted paths.
    """
    trainable_paths = frozenset(optimizer.learning_rates)

    def update_step(
        state: TrainState, grads: Any, loss: WeightedSum
    ) -> tuple[TrainState, Sums]:
        trainable, frozen = partition(state.params, trainable_paths)
        squares = {path: jnp.sum(jnp.square(leaf)) for path, leaf in flatten(grads).items()}
        grad_norm = jnp.sqrt(sum(squares.values()))
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        before = to_device(state.opt_state) if optimizer.on_host else state.opt_state
        updates, opt_state = optimizer.transform.update(grads, before, trainable)
        moved = optax.apply_updates(trainable, updates)
        updated = TrainState(
            step=state.step + 1,
            params=merge(_select(finite, moved, trainable), frozen),
            opt_state=_select(finite, opt_state, before),
        )
        return updated, {
            "grad_norm": _once(grad_norm),
            "learning_rate": _once(learning_rate(optimizer, state.step)),
            "nonfinite": _once(1 - finite.astype(jnp.float32)),
            "grad_norms": jnp.sqrt(jnp.stack([squares[path] for path in sorted(squares)])),
        }

    return update_step


def make_eval_step(functional_model: Any, objective: Objective) -> Callable[[Any, Batch], Sums]:
    """(params, batch) -> terms and metrics as WeightedSums, without dropout.

    "loss" is left to `weighted_total`, after the sums of all batches are added.
    """

    def eval_part(params: Any, batch: Batch) -> Sums:
        predictions = objective.predict(functional_model.bind(params), batch, None)
        return objective.terms(predictions, batch) | objective.metrics(predictions, batch)

    def eval_step(params: Any, batch: Batch) -> Sums:
        return added([eval_part(params, part) for part in parts_of(batch)])

    return eval_step


def parts_of(batch: Batch) -> list[Batch]:
    """The batch, and the batch of other shapes that stands beside it in the same step."""
    first = {name: value for name, value in batch.items() if name != "beside"}
    return [first, batch["beside"]] if "beside" in batch else [first]


def added(trees: Sequence[Any]) -> Any:
    """The sum of pytrees of one structure."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees)


def weighted_total(objective: Objective, sums: Sums) -> jax.Array:
    """float32[]: the objective's total from added-up terms; those that no batch had count 0."""
    weights = objective.weights.items()
    return sum(weight * sums[name].mean() for name, weight in weights if name in sums)


def make_score_step(functional_model: Any) -> Callable[[Any, Batch], jax.Array]:
    """(params, batch) -> float32[B, K, A] log-probabilities of the answer tokens.

    float32[B, K + 1, A] of a batch with manipulated frames; the last row is the chosen answer under
    them.
    """

    def score_step(params: Any, batch: Batch) -> jax.Array:
        model = functional_model.bind(params)

        def logps(batch: Batch) -> jax.Array:
            return answer_scores(model, model(batch, None), batch).logp

        if "contrast_frames" not in batch:
            return logps(batch)
        return jnp.concatenate([logps(batch), logps(contrast_batch(batch))], axis=1)

    return score_step


def accumulate(function: Callable[[Any], Any], rows: Any, count: int) -> Any:
    """Sum over `count` micro-batches of function(micro), in a scan.

    Args:
      rows: pytree of arrays [B, ...]; micro-batch i holds rows i, i + count, ... so that every
        device keeps the rows that it has.
      function: micro -> pytree of sums.

    Raises:
      ValueError: B does not divide by `count`.
    """
    if count == 1:
        return function(rows)
    size = jax.tree.leaves(rows)[0].shape[0]
    if size % count:
        raise UserError(
            f"accumulation={count} does not divide the {size} rows of a batch; "
            "change config.accumulation or the bucket's batch_size"
        )
    micros = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(size // count, count, *x.shape[1:]), 0, 1), rows
    )
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(micro)), None

    return jax.lax.scan(add, zeros, micros)[0]


def jit_train_step(
    gradient_step: GradientStep,
    update_step: UpdateStep,
    mesh: Mesh,
    state_shardings: TrainState,
    gradient_shardings: Any,
) -> TrainStep:
    """Both programs: rows over (data, fsdp), gradients like their parameters, metrics replicated.

    The update takes over the memory of the state. `train` calls the result and
    `plan` lowers it; both get it from `training.program`.
    """
    whole = replicated(mesh)
    gradient = jax.jit(
        on_mesh(gradient_step, mesh),
        in_shardings=(state_shardings, batch_sharding(mesh), whole),
        out_shardings=(gradient_shardings, whole),
        keep_unused=True,  # the compiler has to know that the optimizer's state takes memory, too
    )
    update = jax.jit(
        on_mesh(update_step, mesh),
        in_shardings=(state_shardings, gradient_shardings, whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
    return TrainStep(gradient, update)


def _once(value: jax.Array) -> WeightedSum:
    """The value of one step, for means over steps."""
    return WeightedSum(value, jnp.ones((), jnp.float32))


def _select(finite: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
