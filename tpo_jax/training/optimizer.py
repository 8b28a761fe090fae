"""AdamW or Muon with one learning rate per group of parameters, from optax parts.

Muon orthogonalises the updates of matrices and leaves everything else to AdamW; with its updates
scaled to the size of Adam's, both take the same learning rates (Liu et al. 2025, arXiv:2502.16982).
It is for what starts from random weights, models or heads; fine-tuning is AdamW's, as published.

Groups are `[[regex, learning_rate], ...]` over "/"-joined parameter paths, anchored at the start;
the first match wins. A parameter that no group matches is frozen: it gets no gradient and no
optimizer state. All groups follow one schedule: linear warm-up, then one of SCHEDULES to a floor.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from tpo_jax.errors import UserError
from tpo_jax.parallel.paths import first_match, flatten, map_with_path
from tpo_jax.training.moments import in_bfloat16

Groups = Sequence[tuple[str, float]]

NAMES = ("adamw", "muon")
MOMENTS = ("float32", "bfloat16", "host")
SCHEDULES = ("cosine", "linear")
# Root mean square of a Muon update, as large as Adam's usually are.
MUON_RMS = 0.2
MUON_MOMENTUM = 0.95
# Scales, offsets, embeddings and single learnt vectors are not pulled to zero.
NO_DECAY = r"(.*/)?(bias|scale|embed|position|frame_position|frequencies|task_tokens)(/|$)"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """config.optimizer.

    Attributes:
      name: one of NAMES. Both parts of Muon have Nesterov momentum.
      warmup: share of all steps in [0, 1) with a linearly rising learning rate.
      schedule: how the learning rate falls after that: one of SCHEDULES.
      weight_decay: decoupled, multiplied by the learning rate; matrices only (see NO_DECAY).
      clip: largest global norm of the trainable gradients; 0 switches clipping off.
      min_lr_ratio: learning rate at the last step over the peak.
      moments: how what is remembered of gradients is stored, Adam's two moments and Muon's
        momentum: one of MOMENTS. "bfloat16" takes half the memory; the update is computed in
        float32 either way. "host" keeps them in the memory of the host, as float32; the update
        brings them to the device and back.
      b1, b2, eps: Adam's.
    """

    name: str
    warmup: float
    weight_decay: float
    clip: float
    min_lr_ratio: float
    schedule: str = "cosine"
    moments: str = "float32"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for field, known in (("name", NAMES), ("moments", MOMENTS), ("schedule", SCHEDULES)):
            if (value := getattr(self, field)) not in known:
                raise UserError(
                    f"optimizer.{field}={value!r}: expected one of {', '.join(known)}"
                )
        for field in ("warmup", "min_lr_ratio"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise UserError(f"optimizer.{field}={value}: must be in [0, 1]")
        for field in ("b1", "b2"):  # at 1 a moment keeps what it was, 0
            if not 0 <= (value := getattr(self, field)) < 1:
                raise UserError(f"optimizer.{field}={value}: must be in [0, 1)")
        for field in ("weight_decay", "clip", "eps"):
            if (value := getattr(self, field)) < 0:
                raise UserError(f"optimizer.{field}={value}: must not be negative")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation over the trainable subset, and what it trains.

    Attributes:
      transform: init(trainable) and update(grads, state, trainable), on nested dicts.
      schedule: step -> learning rate as a multiple of each group's own (peak 1).
      learning_rates: {path: peak learning rate} of every trainable parameter.
      report: a table of groups for the log.
      on_host: whether the floating leaves of its state stay in the memory of the host.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    learning_rates: dict[str, float]
    report: str
    on_host: bool = False


def make_optimizer(config: OptimizerConfig, groups: Groups, steps: int, params: Any) -> Optimizer:
    """AdamW or Muon over the parameters that `groups` match.

    Args:
      groups: config.trainable, (regex, peak learning rate).
      steps: optimizer steps of the run, the length of the schedule.
      params: nested dict of arrays or ShapeDtypeStructs; only paths and shapes are read.

    Raises:
      ValueError: a regex that is invalid or matches no parameter, or no trainable parameter.
    """
    assigned = assign_groups(groups, list(flatten(params)))
    rates = {path: float(groups[index][1]) for path, index in assigned.items()}
    schedule = warmup_decay(steps, config.warmup, config.min_lr_ratio, config.schedule)
    rule = _update_rule(config)
    parts = [
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        in_bfloat16(rule) if config.moments == "bfloat16" else rule,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_schedule(schedule),
        _scale_by_path(rates),
    ]
    report = group_report(groups, assigned, flatten(params))
    transform = optax.chain(*parts)
    return Optimizer(transform, schedule, rates, report, on_host=config.moments == "host")


def _update_rule(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to directions, without a learning rate."""
    adam = {"b1": config.b1, "b2": config.b2}
    if config.name == "adamw":
        return optax.scale_by_adam(**adam, eps=config.eps)
    matrices = optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: _orthogonalize(updates)),
    )
    others = optax.scale_by_adam(**adam, eps=config.eps, nesterov=True)
    return optax.partition({"matrix": matrices, "other": others}, _kinds)


def _kinds(params: Any) -> Any:
    """Names the rule of every leaf: "matrix" or "other".

    A matrix has its inputs and outputs on the last two axes; layers are stacked before them.
    Embeddings and output tables are "other".
    """

    def kind(path: str, leaf: Any) -> str:
        is_table = re.match(NO_DECAY, path) or "lm_head/" in path
        return "other" if leaf.ndim < 2 or is_table else "matrix"

    return map_with_path(kind, params)


def _orthogonalize(updates: Any) -> Any:
    """Every matrix to the nearest orthogonal one, with the root mean square that Adam's have.

    Matrices of one shape are stacked: few large products instead of many small ones.
    """
    leaves, structure = jax.tree.flatten(updates)
    wide = [x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2) for x in leaves]
    rows = [x.reshape(-1, *x.shape[-2:]) for x in wide]
    shapes = sorted({x.shape[-2:] for x in rows})
    stacked = {
        shape: jnp.concatenate([x for x in rows if x.shape[-2:] == shape]) for shape in shapes
    }
    # Without momentum optax's rule is a function of this update alone.
    iterate = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False,
        weight_dimension_numbers=dict.fromkeys(
            shapes, optax.contrib.MuonDimensionNumbers((1,), (2,))
        ),
    )  # fmt: skip
    stacked, _ = iterate.update(stacked, iterate.init(stacked))
    used = dict.fromkeys(shapes, 0)
    for i, (leaf, own) in enumerate(zip(wide, rows, strict=True)):
        shape, start = own.shape[-2:], used[own.shape[-2:]]
        used[shape] += len(own)
        part = stacked[shape][start : start + len(own)] * (MUON_RMS * max(shape) ** 0.5)
        part = part.reshape(leaf.shape)
        leaves[i] = part if leaf is leaves[i] else jnp.swapaxes(part, -1, -2)
    return jax.tree.unflatten(structure, leaves)


def assign_groups(groups: Groups, paths: Sequence[str]) -> dict[str, int]:
    """{path: group index} of the trainable paths."""
    patterns = [pattern for pattern, _ in groups]
    for index, pattern in enumerate(patterns):
        try:
            matched = any(re.match(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"trainable[{index}]={pattern!r}: not a regex ({error})") from error
        if not matched:
            roots = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise UserError(
                f"trainable[{index}]={pattern!r} matches no parameter; patterns start at the root "
                f"of a path, which are {', '.join(roots)}"
            )
    found = {path: first_match(patterns, path) for path in paths}
    assigned = {path: index for path, index in found.items() if index is not None}
    for index, pattern in enumerate(patterns):
        if index not in assigned.values():
            raise UserError(
                f"trainable[{index}]={pattern!r}: earlier groups take all that it matches; "
                "put the narrower pattern first"
            )
    if not assigned:
        raise UserError("trainable=[]: nothing to train; give at least one [regex, learning rate]")
    return assigned


def warmup_decay(steps: int, warmup: float, min_lr_ratio: float, decay: str) -> optax.Schedule:
    """step -> multiple of the peak: 0 -> 1 over warmup * steps, then `decay`, one of SCHEDULES, to
    `min_lr_ratio`.

    The first step already moves (its multiple is 1 / warm-up steps), and the last of `steps`
    steps is one before the floor.
    """
    rise = max(1, round(warmup * steps))
    left = max(steps - rise + 1, 1)
    fall = {
        "cosine": optax.cosine_decay_schedule(1.0, left, alpha=min_lr_ratio),
        "linear": optax.linear_schedule(1.0, min_lr_ratio, left),
    }[decay]
    return optax.join_schedules(
        [optax.linear_schedule(1 / rise, 1.0, max(rise - 1, 1)), fall], [rise - 1]
    )


def decay_mask(params: Any) -> Any:
    """Which leaves weight decay applies to: same nest as `params`, bool leaves."""
    return map_with_path(lambda path, _: re.match(NO_DECAY, path) is None, params)


def group_report(groups: Groups, assigned: dict[str, int], leaves: dict[str, Any]) -> str:
    """A table: group, learning rate, leaves, parameters; the frozen rest comes last."""
    rows = [("group", "learning rate", "leaves", "parameters")]
    for index in [*range(len(groups)), None]:
        paths = [path for path in leaves if assigned.get(path) == index]
        count = sum(int(np.prod(leaves[path].shape)) for path in paths)
        pattern, rate = groups[index] if index is not None else ("(frozen)", 0.0)
        rows.append((pattern, f"{rate:g}", str(len(paths)), f"{count:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _scale_by_path(rates: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies every update by minus the learning rate of its path."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return map_with_path(lambda path, update: -rates[path] * update, updates)

    return optax.stateless(scale)


def learning_rate(optimizer: Optimizer, step: jax.Array) -> jax.Array:
    """float32[]: the largest group's learning rate at `step`."""
    return max(optimizer.learning_rates.values()) * optimizer.schedule(step)
