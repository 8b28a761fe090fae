"""The train state: one pytree of nested dicts, frozen parameters included."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tpo_jax.parallel.paths import flatten, unflatten

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    step: int32[], steps done. params: nested dict of all parameters, trainable and frozen.
    opt_state: optimizer state of the trainable parameters only.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def init_state(
    params: Params, transform: optax.GradientTransformation, trainable: Collection[str]
) -> TrainState:
    """State at step 0; `trainable` is the collection of trainable paths."""
    subset, _ = partition(params, trainable)
    return TrainState(jnp.zeros((), jnp.int32), params, transform.init(subset))


def partition(params: Params, trainable: Collection[str]) -> tuple[Params, Params]:
    """Splits nested params by path into (trainable, frozen), both nested dicts without gaps."""
    leaves = flatten(params)
    missing = sorted(set(trainable) - set(leaves))
    if missing:
        raise ValueError(f"params/{missing[0]}: a trainable path that the parameters do not have")
    return (
        unflatten({path: leaf for path, leaf in leaves.items() if path in trainable}),
        unflatten({path: leaf for path, leaf in leaves.items() if path not in trainable}),
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    ours, theirs = flatten(trainable), flatten(frozen)
    both = sorted(set(ours) & set(theirs))
    if both:
        raise ValueError(f"params/{both[0]}: both trainable and frozen")
    return unflatten(ours | theirs)
