"""Reference log-probabilities of a run, and whether they hold for this very program.

Fingerprints say what the sidecar was scored with. This compares what they cannot see (another
version of JAX, another device, a mesh, a kernel) by scoring a random sample of the training pairs,
some of every bucket, each of which is a program of its own.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpo_jax.data.buckets import BucketSchedule
from tpo_jax.data.pipeline import Batch, Pipeline
from tpo_jax.data.rows import Reference
from tpo_jax.interop.folder import load_model
from tpo_jax.parallel.context import AXIS
from tpo_jax.parallel.mesh import global_batch, mesh_shape, replicated
from tpo_jax.training import sidecar
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.program import Program, needs_contrast, run_as
from tpo_jax.training.sidecar import SidecarMismatch
from tpo_jax.training.step import parts_of

# dtype -> largest and mean difference of a token's log-probability that is round-off, in nats.
# Chosen, not derived; docs/preferences.md ("The sidecar") has what was measured in bfloat16.
TOLERANCE = {"float32": (5e-3, 5e-4), "bfloat16": (0.5, 0.05)}
SAMPLE_BATCHES = 2  # at least; every bucket has one


def read_references(config: ConfigDict) -> Reference | None:
    """Reference log-probabilities by pair, or None where the config names no sidecars.

    Refuses sidecars that were not scored with the very model that the run starts from.
    """
    if not config.data.references:
        return None
    model_config, params, codec = load_model(config.init_from, config.init_options.to_dict())
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
      SidecarMismatch: a token, or the mean over those of a bucket, differs by more than TOLERANCE;
        names the pair and what either side says about it.
    """
    dtype = program.model.config.dtype
    largest, mean = TOLERANCE[dtype]
    compare = jax.jit(_compare, out_shardings=replicated(program.mesh))
    totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    worst, answers = (-1.0, 0, 0), {}
    for step in sample_steps(pipeline.schedule, seed):
        preemption.check()
        for bucket, first, local in _batches(pipeline, step):
            batch = global_batch(local, program.mesh)
            live = program.score_step(params, batch)
            differences, weights, both = jax.device_get(compare(live, batch))
            totals[bucket] += differences.sum(), weights.sum()
            peak = np.nan_to_num(differences, nan=np.inf).max(axis=(1, 2))
            row = int(peak.argmax())
            if peak[row] > worst[0]:
                worst, answers = (float(peak[row]), step, first + row), both[:, row]
    average = max(total / max(tokens, 1) for total, tokens in totals.values())
    if worst[0] <= largest and average <= mean:
        tokens = int(sum(totals.values())[1])
        say(
            f"references hold: {tokens} tokens of {', '.join(sorted(totals))} differ by up to "
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


def sample_steps(schedule: BucketSchedule, seed: int) -> Iterator[int]:
    """SAMPLE_BATCHES random steps, and one of every bucket that has none of these."""
    rng = np.random.default_rng(seed)
    missing, count = {bucket.name for bucket in schedule.buckets}, 0
    while missing or count < SAMPLE_BATCHES:
        step = int(rng.integers(0, 2**20))
        name = schedule(step)[0].name
        if name in missing or count < SAMPLE_BATCHES:
            missing.discard(name)
            count += 1
            yield step


def _batches(pipeline: Pipeline, step: int) -> Iterator[tuple[str, int, Batch]]:
    """(bucket, place of its first row among all rows of the step, this process's rows) of the
    bucket of a step and of the one beside it."""
    name, batch = pipeline.batch(step)
    bucket = pipeline.builders[name].bucket
    names, firsts = (name, bucket.beside), (0, bucket.batch_size)
    yield from zip(names, firsts, parts_of(batch), strict=False)


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
    (example_id,) = pipeline.describe_batch(step)[1][row]["examples"]
    return repr(example_id)
