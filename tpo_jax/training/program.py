"""The compiled program of a run, from its config: what `train` calls and `plan` compiles."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tpo_jax.errors import UserError
from tpo_jax.models.attention import best_backend
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.objectives.preference import PreferenceConfig
from tpo_jax.parallel.context import AXIS
from tpo_jax.parallel.mesh import batch_sharding, check_batch_divides, on_mesh, replicated
from tpo_jax.parallel.rules import follow_params, param_shardings, place
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training.moments import host_shardings
from tpo_jax.training.objective import (
    Objective,
    PreferenceObjective,
    SftObjective,
    check_adapters_off,
)
from tpo_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from tpo_jax.training.state import Params, TrainState, init_state, partition
from tpo_jax.training.step import (
    TrainStep,
    jit_train_step,
    make_eval_step,
    make_gradient_step,
    make_score_step,
    make_update_step,
)
from tpo_jax.training.task_gradients import make_task_gradients


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything of a run that is decided before data is read.

    Attributes:
      model: FunctionalModel with the config's dropout.
      abstract_state: TrainState of ShapeDtypeStruct with shardings, to compile or restore into.
      train_step: jitted (state, batch, base_key) -> (state, metrics); donates state. Two programs.
      eval_step: jitted (params, batch) -> terms and metrics, see `weighted_total`.
      score_step: jitted (params, batch) -> float32[B, K, A] token log-probabilities, replicated;
        with a row more where the batch has manipulated frames.
      task_gradients: jitted (params, step, batch, base_key) -> metrics; None where
        config.task_gradients_every is 0.
    """

    model: FunctionalModel
    objective: Objective
    optimizer: Optimizer
    mesh: Mesh
    accumulation: int
    abstract_state: TrainState
    train_step: TrainStep
    eval_step: Any
    score_step: Any
    task_gradients: Any

    @property
    def param_shardings(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state.params)

    def init_params(self, seed: int) -> Params:
        """Freshly drawn parameters, each device drawing its own shards."""
        draw = jax.jit(self.model.init, out_shardings=self.param_shardings)
        return draw(jax.random.key(seed))

    def init_state(self, params: Params) -> TrainState:
        """State at step 0 on the mesh.

        Args:
          params: host arrays, or arrays of `init_params`. Arrays that are on the mesh already are
            taken over: the first train step donates them.
        """
        if not isinstance(jax.tree.leaves(params)[0], jax.Array):
            params = place(params, self.param_shardings)
        start = jax.jit(
            lambda p: init_state(p, self.optimizer.transform, self.trainable).opt_state,
            out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state.opt_state),
        )
        step = place(np.zeros((), np.int32), replicated(self.mesh))
        return TrainState(step, params, start(params))

    @property
    def trainable(self) -> frozenset[str]:
        return frozenset(self.optimizer.learning_rates)

    def base_key(self, seed: int) -> jax.Array:
        """The run's random key, key[], on every device of the mesh."""
        return jax.jit(jax.random.key, out_shardings=replicated(self.mesh))(jnp.uint32(seed))

    def lower_gradient(self, batch: Any) -> jax.stages.Lowered:
        """Lowers the gradient for a batch (arrays or ShapeDtypeStructs of global shape)."""
        check_batch_divides(batch, self.mesh, self.accumulation)
        key = jax.eval_shape(jax.random.key, jnp.uint32(0))
        return self.train_step.gradient.lower(self.abstract_state, batch, key)

    def lower_task_gradients(self, batch: Any) -> jax.stages.Lowered:
        """Lowers the sizes of the tasks' gradients for a batch."""
        key = jax.eval_shape(jax.random.key, jnp.uint32(0))
        state = self.abstract_state
        return self.task_gradients.lower(state.params, state.step, batch, key)

    def lower_update(self) -> jax.stages.Lowered:
        """Lowers the update, which all batches share."""
        trainable, _ = partition(self.abstract_state.params, self.trainable)
        gradients = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trainable
        )
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        loss = WeightedSum(scalar, scalar)
        return self.train_step.update.lower(self.abstract_state, gradients, loss)

    def compile_train_step(self, batch: Any, options: Mapping | None = None) -> TrainStep:
        """Both programs for one shape of batch; `options` are the compiler's."""
        return TrainStep(
            self.lower_gradient(batch).compile(options), self.lower_update().compile(options)
        )


def make_objective(config: ConfigDict) -> Objective:
    """config.objective with its options."""
    if config.objective == "preference":
        options = config.preference.to_dict()
        reference = options.pop("reference", "sidecar")
        return PreferenceObjective(PreferenceConfig(**options), reference)
    if config.objective == "sft":
        return SftObjective(config.losses.to_dict())
    raise UserError(f"objective={config.objective!r}: expected 'sft' or 'preference'")


def needs_contrast(config: ConfigDict) -> bool:
    """Whether pairs have to bring their manipulated frames."""
    objective = make_objective(config)
    return isinstance(objective, PreferenceObjective) and objective.config.needs_contrast


def make_program(
    config: ConfigDict, model_config: ModelConfig, mesh: Mesh, platform: str = ""
) -> Program:
    """Builds the steps of a run.

    Args:
      config: training config; reads objective, losses, preference, trainable, optimizer, steps,
        accumulation, dropout and task_gradients_every.
      model_config: of the preset or of the model folder in init_from, from start.make_model_config.
      mesh: from parallel.mesh.make_mesh, of real devices or of a topology.
      platform: "cpu", "gpu" or "tpu", of a mesh without devices; "": that of its devices.

    Raises:
      ValueError: an option of the config that this model or these devices cannot do.
    """
    attention = _attention(model_config, mesh, platform or mesh.devices.flat[0].platform)
    language = dataclasses.replace(
        model_config.language, dropout=config.dropout, attention=attention
    )
    model = FunctionalModel(dataclasses.replace(model_config, language=language))
    objective = make_objective(config)
    groups = [(pattern, rate) for pattern, rate in config.trainable]
    optimizer = make_optimizer(
        OptimizerConfig(**config.optimizer.to_dict()), groups, config.steps, model.abstract()
    )
    if isinstance(objective, PreferenceObjective) and objective.reference == "adapters_off":
        check_adapters_off(model_config, optimizer.learning_rates)
    abstract_state = make_abstract_state(model.abstract(), optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    drops = config.dropout > 0 or bool(model_config.lora and model_config.lora.dropout)
    how = {"accumulation": config.accumulation, "dropout": drops}
    gradient_step = make_gradient_step(model, objective, optimizer, **how)
    gradients, _ = partition(shardings.params, frozenset(optimizer.learning_rates))
    rows, whole = batch_sharding(mesh), replicated(mesh)
    jit = functools.partial(
        jax.jit, in_shardings=(shardings.params, rows), out_shardings=whole
    )
    task_gradients = None
    if config.task_gradients_every:
        task_gradients = jax.jit(
            on_mesh(make_task_gradients(model, objective, optimizer, **how), mesh),
            in_shardings=(shardings.params, whole, rows, whole),
            out_shardings=whole,
        )
    return Program(
        model=model,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        accumulation=config.accumulation,
        abstract_state=abstract_state,
        train_step=jit_train_step(
            gradient_step, make_update_step(optimizer), mesh, shardings, gradients
        ),
        eval_step=jit(on_mesh(make_eval_step(model, objective), mesh)),
        score_step=jit(on_mesh(make_score_step(model), mesh)),
        task_gradients=task_gradients,
    )


def run_as(config: ConfigDict, model_config: ModelConfig) -> ModelConfig:
    """The model as config.model says that it runs."""
    options = config.model
    return model_config.running(
        attention=options.attention, remat=options.remat, dtype=options.dtype
    )


def _attention(model_config: ModelConfig, mesh: Mesh, platform: str) -> str:
    """The kernel of the devices, which need not be this process's own."""
    language = model_config.language
    if language.attention == "auto":
        return best_backend(platform, model_config.dtype, language.head_dim, mesh.shape[AXIS])
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(language.attention, platform)
    if platform != needed:
        raise UserError(
            f"model.attention={language.attention!r}: runs on {needed} and the devices are "
            f"{platform}; use 'auto'"
        )
    return language.attention


def make_abstract_state(params: Params, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """TrainState of ShapeDtypeStruct with shardings, of nested ShapeDtypeStructs."""
    shardings = param_shardings(params, mesh)
    state = jax.eval_shape(
        lambda p: init_state(p, optimizer.transform, frozenset(optimizer.learning_rates)), params
    )
    opt_state = follow_params(state.opt_state, params, shardings, mesh)
    if optimizer.on_host:
        opt_state = host_shardings(state.opt_state, opt_state)
    placed = TrainState(step=replicated(mesh), params=shardings, opt_state=opt_state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
