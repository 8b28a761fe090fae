"""Other layouts of a preference step than ours: objectives that take our batches and programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tpo_jax.training.objective import Batch, Objective, PreferenceObjective, PreferenceScores
from tpo_jax.training.program import Program
from tpo_jax.training.state import partition
from tpo_jax.training.step import jit_train_step, make_gradient_step, make_update_step

OF_BRANCHES = ("branch_", "answer_", "reference_logps")


class TwoRowsObjective(PreferenceObjective):
    """The same losses of the same batch, from a row for each answer, with a clip of its own."""

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> PreferenceScores:
        if keys is not None:
            raise ValueError("dropout: this layout has none; leave config.dropout=0")
        found = super().predict(model, as_rows(batch), None)
        B, K, A = batch["answer_tokens"].shape
        return jax.tree.map(lambda x: x.reshape(B, K, A), found)


def as_rows(batch: Batch) -> Batch:
    """A row [prefix, branch] for every branch of a batch without slots: arrays of branches
    [B, K, ...] -> [B * K, 1, ...], all others [B, ...] -> [B * K, ...], K times each row."""
    K = batch["branch_tokens"].shape[1]
    return {
        name: x.reshape(-1, 1, *x.shape[2:])
        if name.startswith(OF_BRANCHES)
        else jax.tree.map(lambda leaf: jnp.repeat(leaf, K, axis=0), x)
        for name, x in batch.items()
    }


def with_objective(program: Program, objective: Objective) -> Program:
    """The program whose gradient is that of another objective; all else is kept."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    gradients, _ = partition(shardings.params, program.trainable)
    step = make_gradient_step(
        program.model, objective, program.optimizer, accumulation=program.accumulation
    )
    update = make_update_step(program.optimizer)
    jitted = jit_train_step(step, update, program.mesh, shardings, gradients)
    return dataclasses.replace(program, objective=objective, train_step=jitted)
