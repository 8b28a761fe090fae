"""Reference log-probabilities of a run, and whether they hold for this very program.

Fingerprints say what the sidecar was scored with. This compares what they cannot see (another
version of JAX, another device, a mesh, a kernel) by scoring a random sample of the training pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.rows import Reference
from tpo_jax.interop.folder import load_model
from tpo_jax.parallel.context import AXIS
from tpo_jax.parallel.mesh import global_batch, mesh_shape, replicated
from tpo_jax.training import sidecar
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.program import Program, needs_contrast, run_as
from tpo_jax.training.sidecar import SidecarMismatch

# dtype -> largest and mean difference of a token's log-probability that is round-off, in nats.
TOLERANCE = {"float32": (5e-3, 5e-4), "bfloat16": (0.5, 0.05)}
SAMPLE_BATCHES = 2


def read_references(config: ConfigDict) -> Reference | None:
    """Reference log-probabilities by pair, or None where the config names no sidecars.

    Refuses sidecars that were not scored with the very model that the run starts from.
    """
    if not config.data.references:
        return None
    model_config, params, codec = load_model(config.init_from)
    model_config = run_as(config, model_config)
    frames = {bucket.frames for bucket in config.buckets.values()}
    (answers,) = {bucket.answers for bucket in config.buckets.values()}
    expected = sidecar.Fingerprint.of(
        model_config, params, codec, frames, contrast=needs_contrast(config),
        context=row_devices(config),
    )  # fmt: skip
    return sidecar.reference(config.data.references, expected, answers, codec.pad_id)


def row_devices(config: ConfigDict) -> int:
    """Devices that share a row on the mesh of the config, over this run's devices."""
    sizes = config.mesh.to_dict()
    given = sizes[AXIS]
    return given if given > 0 else mesh_shape(sizes, jax.device_count())[AXIS]


def verify_references(
    program: Program,
    pipeline: Pipeline,
    params: Any,
    *,
    seed: int,
    files: Sequence[str],
    say: Callable[[str], None],
    preemption: Preemption,
) -> None:
    """Scores random training pairs with the policy as it starts and compares with their sidecar.

    Every process calls it, with the same arguments but for its own pipeline.

    Args:
      params: of step 0, on the program's mesh.
      seed: of the sample.
      files: sidecars, for the message.
      preemption: polled before every batch.

    Raises:
      Preempted: told to stop.
      SidecarMismatch: a token, or the mean over all of them, differs by more than TOLERANCE; names
        the pair and what either side says about it.
    """
    dtype = program.model.config.dtype
    largest, mean = TOLERANCE[dtype]
    compare = jax.jit(_compare, out_shardings=replicated(program.mesh))
    steps = np.random.default_rng(seed).integers(0, 2**20, SAMPLE_BATCHES)
    totals, worst = np.zeros(2), (-1.0, 0, 0)
    answers = {}
    for step in map(int, steps):
        preemption.check()
        _, local = pipeline.batch(step)
        batch = global_batch(local, program.mesh)
        live = program.score_step(params, batch)
        differences, weights, both = jax.device_get(compare(live, batch))
        totals += differences.sum(), weights.sum()
        peak = np.nan_to_num(differences, nan=np.inf).max(axis=(1, 2))
        row = int(peak.argmax())
        if peak[row] > worst[0]:
            worst, answers = (float(peak[row]), step, row), both[:, row]
    average = totals[0] / max(totals[1], 1)
    if worst[0] <= largest and average <= mean:
        say(
            f"references hold: {int(totals[1])} tokens of {SAMPLE_BATCHES} batches differ by "
            f"{average:.1e} nats on average, {worst[0]:.1e} at most"
        )
        return
    peak, step, row = worst
    contrast = "reference_contrast_logps" in batch
    names = ["chosen", *["rejected"] * (answers.shape[1] - 1 - contrast)]
    names += ["chosen under the manipulated frames"] * contrast
    raise SidecarMismatch(
        f"the reference log-probabilities are not those of the model that this run starts from.\n"
        f"  pair: {_pair_id(pipeline, step, row)}, summed over its answers "
        f"({', '.join(names)})\n"
        f"  sidecar {', '.join(map(str, files))}: {_sums(answers[0])}\n"
        f"  this program: {_sums(answers[1])}\n"
        f"A token differs by up to {peak:.3g} nats, {average:.3g} on average; allowed for {dtype} "
        f"are {largest:g} and {mean:g}. Weights, text and frames are the same (the fingerprints "
        "agree), so score again with this version of JAX on this kind of device, or find out what "
        "changed in the program."
    )


def _compare(live: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differences and weights float32[B, n, A], and (sidecar, live) float32[2, B, n, A].

    n counts the answers, and the chosen one again where it is scored under manipulated frames too.
    """
    stored, weights = batch["reference_logps"], batch["answer_weights"]
    if "reference_contrast_logps" in batch:
        contrast = batch["reference_contrast_logps"][:, None]
        stored = jnp.concatenate([stored, contrast], axis=1)
        weights = jnp.concatenate([weights, weights[:, :1]], axis=1)
    weights = (weights > 0) * batch["pair_valid"][:, None, None]
    both = jnp.stack([stored, live])
    both = jnp.where(weights > 0, both, 0.0)
    return jnp.abs(both[1] - both[0]), weights.astype(jnp.float32), both


def _sums(logps: np.ndarray) -> str:
    return ", ".join(f"{x:.4f}" for x in logps.sum(-1))


def _pair_id(pipeline: Pipeline, step: int, row: int) -> str:
    """Its id where this process reads the row, else its place."""
    _, rows, plans = pipeline.plans(step)
    here = row - pipeline.process_index * len(rows)
    if 0 <= here < len(plans):
        return repr(plans[here].branches[0].example.example_id)
    return f"row {row} of step {step}"
