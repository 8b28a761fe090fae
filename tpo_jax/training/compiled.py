"""Everything is compiled before the loop; inside it, a shape that is not compiled is an error."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tpo_jax.data.pipeline import blank_batch
from tpo_jax.data.rows import RowBuilder
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.flops import train_flops
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.program import Program
from tpo_jax.training.step import TrainStep, parts_of


def keep_programs(folder: str) -> None:
    """Compiled programs are written to a folder, local or gs://, and read back by a restart."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@dataclasses.dataclass(frozen=True)
class CompiledBucket:
    """The programs of one bucket; they cannot trace, so a wrong shape is an error, not a recompile.

    tokens: positions of the decoder in one batch, padding included.
    flops: model FLOPs of one train step (training.flops).
    task_gradients: of the program, or None.
    """

    name: str
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]]
    tokens: int
    flops: float
    train_step: TrainStep
    eval_program: Any
    task_gradients: Any

    def train(
        self, state: Any, batch: Any, key: jax.Array, before_update: Callable[[Any], None]
    ) -> Any:
        self._check(batch)
        return self.train_step(state, batch, key, before_update)

    def evaluate(self, params: Any, batch: Any) -> Any:
        self._check(batch)
        return self.eval_program(params, batch)

    def measure_tasks(self, state: Any, batch: Any, key: jax.Array) -> Any:
        """Metrics of training.task_gradients, before the step that `batch` is for."""
        self._check(batch)
        return self.task_gradients(state.params, state.step, batch, key)

    def _check(self, batch: Any) -> None:
        shapes = {path: (x.shape, x.dtype) for path, x in flatten(batch).items()}
        if shapes != self.shapes:
            wrong = [
                f"  {path}: compiled for {self.shapes.get(path)}, got {shapes.get(path)}"
                for path in sorted(shapes.keys() | self.shapes.keys())
                if shapes.get(path) != self.shapes.get(path)
            ]
            raise ValueError(
                f"a batch of bucket {self.name!r} would compile again:\n" + "\n".join(wrong)
            )


def compile_buckets(
    program: Program,
    builders: Mapping[str, RowBuilder],
    evaluate: bool,
    say: Callable[[str], None],
    preemption: Preemption,
) -> dict[str, CompiledBucket]:
    """Compiles the steps of every bucket.

    Args:
      builders: of the pipeline, by bucket name; they know the shapes.
      evaluate: whether the validation step is compiled as well.
      say: told of each bucket that is done.
      preemption: polled after every program.

    Raises:
      Preempted: told to stop; what is compiled stays in the compile cache, if there is one.
    """
    begin = time.monotonic()
    update = program.lower_update().compile()
    say(f"compiled the update of all buckets in {time.monotonic() - begin:.1f} s")
    compiled = {}
    for name, builder in builders.items():
        begin = time.monotonic()
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blank_batch(builder))
        leaves = flatten(batch)
        rows, tokens = 0, 0
        for part in parts_of(batch):
            prefixes, branches = part["prefix_tokens"].shape, part["branch_tokens"].shape
            rows += branches[0]
            tokens += int(np.prod(prefixes) + np.prod(branches))
        params = program.abstract_state.params
        preemption.check()
        gradient = program.lower_gradient(batch).compile()
        preemption.check()
        lowered = program.eval_step.lower(params, batch) if evaluate else None
        measuring = None
        if program.task_gradients is not None:
            measuring = program.lower_task_gradients(batch).compile()
            preemption.check()
        compiled[name] = CompiledBucket(
            name=name,
            shapes={path: (x.shape, x.dtype) for path, x in leaves.items()},
            tokens=tokens,
            flops=sum(
                train_flops(
                    program.model.config, part, program.optimizer.learning_rates,
                    program.objective.weights,
                )  # fmt: skip
                for part in parts_of(batch)
            ),
            train_step=TrainStep(gradient, update),
            eval_program=lowered.compile() if lowered is not None else None,
            task_gradients=measuring,
        )
        say(f"compiled bucket {name!r} ({rows} rows) in {time.monotonic() - begin:.1f} s")
    preemption.check()
    return compiled
