"""Reference log-probabilities of a manifest of pairs: scored in parts, merged into one sidecar.

A part is some batches of pairs in a file of its own beside the sidecar. Whoever finishes the last
part merges them; what is on disk of a part and still fits is not scored again. So an interrupted
command goes on where it was, and several that share the folder, each with its --shard of --shards,
divide the work. Processes that are started with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID score every part together, their devices as one mesh.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.evaluation_rows import batches, build_pair_rows
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.pipeline import row_builder, shown_frames
from tpo_jax.data.rows import RowBuilder, RowPlan, choose_builder
from tpo_jax.data.text import TextCodec
from tpo_jax.errors import UserError
from tpo_jax.interop.folder import load_model
from tpo_jax.models.config import ATTENTION_BACKENDS, DTYPES, ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.context import AXIS
from tpo_jax.parallel.distributed import say
from tpo_jax.parallel.mesh import (
    batch_sharding,
    global_batch,
    mesh_of_devices,
    on_mesh,
    reader_shard,
    replicated,
)
from tpo_jax.parallel.rules import param_shardings, place
from tpo_jax.training import sidecar
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.step import make_score_step

PART_BATCHES = 4  # batches between two saves; what a killed command loses at most


def score(flags: argparse.Namespace, preemption: Preemption) -> None:
    """Writes the sidecar, or this shard's parts of it.

    Raises:
      Preempted: told to stop; every batch that was scored is on disk.
    """
    join(flags, preemption)
    config, params, codec = load_model(flags.model)
    config = config.running(attention=flags.attention, remat="", dtype=flags.dtype)
    plans = build_pair_rows(PairedDataset(flags.data, flags.pairs))
    if not plans:
        raise UserError(f"{flags.pairs}: no pairs; generate some first")
    frames = sorted(set(flags.frames)) or [shown_frames(codec, config)]
    fingerprint = sidecar.Fingerprint.of(
        config, params, codec, frames, contrast=flags.contrast,
        context=mesh_of_devices(mesh_sizes(flags)).shape[AXIS])
    bucket = pair_bucket(codec, config, plans, frames[-1], flags.batch_size)
    builders = [
        row_builder(codec, config, dataclasses.replace(bucket, name=f"pairs{count}", frames=count),
                    contrast=flags.contrast)
        for count in frames]
    parts = Parts(epath.Path(flags.out), fingerprint, builders, plans)
    if parts.finished():
        say(f"{flags.out}: {len(plans)} pairs are scored already")
        return
    scorer = Scorer(config, params, mesh_sizes(flags))
    mine = range(flags.shard, len(parts), flags.shards)
    for number in tqdm.tqdm(mine, desc="score", unit="part"):
        if not parts.is_scored(number):
            score_part(parts, number, scorer, preemption)
    if missing := parts.merge():
        say(f"{flags.out}: parts {missing} of {len(parts)} are left to the other shards")
    else:
        say(f"{flags.out}: {len(plans)} pairs scored")


def score_part(parts: Parts, number: int, scorer: Scorer, preemption: Preemption) -> None:
    """Scores what is left of a part. Whatever ends it, the batches that are finished are kept."""
    builder, plans = parts[number]
    found = parts.begun(number)
    try:
        for logps in scorer(builder, plans[len(found) :], preemption):
            found |= logps
    finally:
        parts.write(number, found)


def join(flags: argparse.Namespace, preemption: Preemption) -> None:
    """Checks the flags of `add_devices` and joins the other processes, if there are any."""
    if not 0 <= flags.shard < flags.shards:
        raise UserError(f"--shard={flags.shard}: expected 0..{flags.shards - 1} (--shards)")
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        count, index = (int(os.environ[f"JAX_{name}"]) for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(num_processes=count, process_id=index)
        preemption.joined()


def mesh_sizes(flags: argparse.Namespace) -> dict[str, int]:
    return {"data": flags.data_parallel, "fsdp": flags.fsdp, "context": flags.context}


class Scorer:
    """Per-token log-probabilities of pairs, on a mesh.

    Args:
      sizes: of the mesh. Processes that JAX has joined have to be in it with all their devices.
    """

    def __init__(self, config: ModelConfig, params: Any, sizes: dict[str, int]):
        model = FunctionalModel(config)
        self.mesh = mesh_of_devices(sizes)
        shardings = param_shardings(params, self.mesh)
        self.params = place(params, shardings)
        self._step = jax.jit(
            on_mesh(functools.partial(_logps, make_score_step(model)), self.mesh),
            in_shardings=(shardings, batch_sharding(self.mesh)),
            out_shardings=replicated(self.mesh),
        )

    def __call__(self, builder: RowBuilder, plans: Sequence[RowPlan],
                 preemption: Preemption) -> Iterator[dict[str, np.ndarray]]:
        """{pair id: float32[n, A]} of the n answers of each batch's pairs, on every process; 0
        where there is no token.

        A row more where the builder gives manipulated frames as well. Raises Preempted.
        """
        size = builder.bucket.batch_size
        share = reader_shard(self.mesh)
        for number, (local, _) in enumerate(batches(builder, plans, *share)):
            preemption.check()
            batch = global_batch(local, self.mesh)
            logps = np.asarray(self._step(self.params, batch))
            rows = plans[number * size : (number + 1) * size]
            found = {}
            for row, plan in zip(logps, rows, strict=False):  # the last batch may have more rows
                empty = range(len(plan.branches), builder.bucket.branches)
                found[pair_id(plan)] = np.delete(row, empty, axis=0)
            yield found


def _logps(step: Any, params: Any, batch: Any) -> jax.Array:
    """What `make_score_step` gives, 0 where there is no token."""
    logps, counts = step(params, batch), batch["answer_weights"] > 0
    if logps.shape[1] > counts.shape[1]:  # the chosen answer under the manipulated frames
        counts = jnp.concatenate([counts, counts[:, :1]], axis=1)
    return logps * counts


class Parts:
    """The parts of one sidecar, (builder, plans) each, and what they have to hold.

    Args:
      builders: of buckets that differ in their frames alone, fewest first; pairs go to them as they
        do in training.
    """

    def __init__(self, out: epath.Path, fingerprint: sidecar.Fingerprint,
                 builders: Sequence[RowBuilder], plans: Sequence[RowPlan]):
        self.out, self.fingerprint, self.plans = out, fingerprint, plans
        self.folder = out.parent / f"{out.name}.parts"
        chosen = [choose_builder(builders, plan) for plan in plans]
        self.digests = {pair_id(plan): digest_of(builder, plan)
                        for builder, plan in zip(chosen, plans, strict=True)}
        self._parts: list[tuple[RowBuilder, list[RowPlan]]] = []
        for builder in builders:
            mine = [plan for one, plan in zip(chosen, plans, strict=True) if one is builder]
            size = PART_BATCHES * builder.bucket.batch_size
            self._parts += [(builder, mine[i : i + size]) for i in range(0, len(mine), size)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> tuple[RowBuilder, list[RowPlan]]:
        return self._parts[number]

    def file(self, number: int) -> epath.Path:
        return self.folder / f"{number:05d}.npz"

    def finished(self) -> bool:
        return self._holds(self._read(self.out), self.plans)

    def is_scored(self, number: int) -> bool:
        return self._holds(self._read(self.file(number)), self[number][1])

    def begun(self, number: int) -> dict[str, np.ndarray]:
        """{pair: float32[...] log-probabilities} of the first pairs of a part, where a command was
        stopped in it; none if they do not fit."""
        there, plans = self._read(self.file(number)), self[number][1]
        if there is None or not self._holds(there, plans[: len(there.digests)]):
            return {}
        return dict(there.logps)

    def _read(self, file: epath.Path) -> sidecar.Sidecar | None:
        """None where there is none, or one of another version: scored again, as what changed is."""
        try:
            return sidecar.read(file) if file.exists() else None
        except sidecar.SidecarMismatch:
            return None

    def _holds(self, scored: sidecar.Sidecar | None, plans: Sequence[RowPlan]) -> bool:
        """Whether a sidecar is there and holds exactly these pairs under these conditions."""
        if scored is None:
            return False
        wanted = {pair_id(plan): self.digests[pair_id(plan)] for plan in plans}
        return scored.fingerprint == self.fingerprint and dict(scored.digests) == wanted

    def write(self, number: int, logps: dict[str, np.ndarray]) -> None:
        if logps and jax.process_index() == 0:
            digests = {pair: self.digests[pair] for pair in logps}
            sidecar.write(self.file(number), sidecar.Sidecar(self.fingerprint, digests, logps))

    def merge(self) -> list[int]:
        """Writes the sidecar if every part is there; returns the numbers of those that are not."""
        if jax.process_index() != 0:
            return []
        try:
            missing = [number for number in range(len(self)) if not self.is_scored(number)]
            if not missing:
                parts = [sidecar.read(self.file(number)) for number in range(len(self))]
                sidecar.write(self.out, sidecar.merge(parts))
                self.folder.rmtree(missing_ok=True)
            return [] if self.out.exists() and self.finished() else missing
        except FileNotFoundError:  # another shard merged meanwhile and took the parts away
            if self.finished():
                return []
            raise


def pair_bucket(codec: TextCodec, config: ModelConfig, plans: Sequence[RowPlan], frames: int,
                batch_size: int) -> Bucket:
    """The smallest bucket that holds every pair."""
    branches = [codec.build_branch(None, b.answer) for plan in plans for b in plan.branches]
    questions = [len(codec.build_prefix(0, "video", plan.question)) for plan in plans]
    return Bucket(
        name="pairs", media="video", batch_size=batch_size, frames=frames,
        branches=max(len(plan.branches) for plan in plans),
        question=max(questions) - len(codec.build_prefix(0, "video")),
        branch_tokens=max(len(branch.ids) for branch in branches),
        answers=max(len(branch.ids) - branch.answer for branch in branches),
        windows=1, mask_size=config.mask_size)


def pair_id(plan: RowPlan) -> str:
    return plan.branches[0].example.example_id


def digest_of(builder: RowBuilder, plan: RowPlan) -> str:
    """`hash_row` of a pair, as the data pipeline asks for it."""
    prefix, branches = builder.tokens(plan)
    rows = [branch.ids for branch in branches]
    stored = plan.dataset.video_info(plan.video_id).stored
    return sidecar.hash_row(
        builder.shown_frames(plan), stored, prefix, *rows, pad_id=builder.codec.pad_id)


def frame_counts(text: str) -> tuple[int, ...]:
    """"8,16,32" as numbers of frames; "0" stands for none given."""
    counts = tuple(int(part) for part in text.split(","))
    if counts == (0,):
        return ()
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers of frames, such as 8,16,32")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="model folder of the reference, i.e. where DPO starts")
    add("--data", required=True, help="prepared split that the pairs were generated on")
    add("--pairs", required=True, help="pairs.jsonl")
    add("--out", required=True, help="sidecar to write, .npz")
    add("--frames", type=frame_counts, default=(), metavar="N,N", help="of the training buckets "
        "(default: one, of as many as the model was published with, else as it takes)")
    add("--batch_size", type=int, default=16, help="pairs at a time (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="", help="to compute in, as the model.dtype of the run "
        "(default: that of the model)")
    add("--attention", choices=ATTENTION_BACKENDS, default="auto", help="kernel, as the "
        "model.attention of the run (default: %(default)s)")
    add("--contrast", action="store_true", help="score chosen answers under the manipulated "
        "frames as well, for preference.loss 'conditional'")
    add_devices(parser)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """What divides the work of `generate` and of `score`."""
    add = parser.add_argument
    add("--shards", type=int, default=1, help="independent commands that share --out")
    add("--shard", type=int, default=0, help="which of them this is, from 0")
    add("--data_parallel", type=int, default=1, help="devices over which rows are split; -1: all "
        "that are left (default: %(default)s)")
    add("--fsdp", type=int, default=1, help="devices over which weights are split as well "
        "(default: %(default)s)")
    add("--context", type=int, default=1, help="devices over which the frames and the prefix of a "
        "row are split (default: %(default)s)")
