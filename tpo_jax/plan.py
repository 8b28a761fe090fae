"""Compiles a run for a TPU topology without a TPU: does it fit, and what does it cost?

    python -m tpo_jax.plan --config=configs/demo.py:stage=1 --topology=v5e:2x4
    python -m tpo_jax.plan --config=configs/demo.py:stage=1 --topology=v4:2x2x2 --config.mesh.fsdp=8
    python -m tpo_jax.plan --config=runs/stage2/config.json --topology=v5e:2x4

The folder in init_from must be there: stages 2 and 3 are planned after the one before has run.

What is compiled is what `python -m tpo_jax.train` runs: the update, and the gradient of every
bucket of the config. Prints for each: memory of one chip against its HBM, and how many collectives
the text of the program has (a loop counts once there); for buckets also analytic FLOPs (see
training/flops.py for what is counted), the bytes that a chip sends in a step, the least time that
products, memory traffic and network allow (see training/estimate.py, which those bytes are of), the
chip-hours of the bucket's share of config.steps, and the largest batch that would fit by the
estimate; at last the chip-hours of all steps, without validation and checkpoints.
experiments/plans.py does this for the published families. Exits with status 1 where one does not
fit. Needs libtpu: pip install 'tpo_jax[plan]'.

Topologies are GENERATION:SIZES: v5e:2x4, v5e:16x16, v6e:4x4, v4:2x2x2, v5p:2x2x1, ...
With --num_slices=N, N of them over the data centre network, and mesh.data a multiple of N: prints
what a chip sends to other slices in a step, and exits with 1 where that is more than 1 MB beside
the gradients.
"""

import dataclasses
import math
import re
import sys
import time
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket, BucketSchedule, scheduled
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.errors import UserError
from tpo_jax.errors import report as report_mistake
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.listed import load_listed
from tpo_jax.parallel.collectives import Collective, read_collectives
from tpo_jax.parallel.mesh import describe_shape, make_mesh
from tpo_jax.parallel.topologies import GIB, parse_topology, prepare_environment, topology_devices
from tpo_jax.parallel.transfers import Transfer, find_transfers
from tpo_jax.train import NUM_SLICES, TOPOLOGY  # brings train's flags, --config among them
from tpo_jax.training import config as training_config
from tpo_jax.training.config_flag import parse_flags
from tpo_jax.training.estimate import Estimate, estimate_step
from tpo_jax.training.program import Program, make_program, needs_contrast
from tpo_jax.training.start import make_model_config
from tpo_jax.training.state import partition

flags.set_default(TOPOLOGY, "v5e:2x4")
for _name in ("config", "topology", "num_slices"):  # defined by train, and of this --help
    flags.declare_key_flag(_name)

MOST_BESIDE_GRADIENTS = 1e6  # bytes a chip may send to other slices in a step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    arguments: state, and batch or gradients. outputs: what is not written over an argument.
    temporaries: while the program runs. peak: the most that is held at one time, by the compiler's
    own schedule. host: beside all these, of the memory of the host.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int
    host: int


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What compiling one program showed; memory is None where the compiler ran out of it.

    bucket: whose gradient it is; None for the update. needed: bytes of one chip.
    collectives: {kind: count in the program text, and bytes by it; see parallel/collectives.py}.
    transfers: to other slices. gradients: bytes of the float32 gradients that a chip holds.
    """

    bucket: Bucket | None
    seconds: float
    memory: Memory | None
    needed: int
    collectives: dict[str, Collective]
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    gradients: int = 0

    @property
    def beside_gradients(self) -> int:
        """Bytes that a chip sends to other slices in a step, without summing up gradients."""
        summed = sum(t.bytes for t in self.transfers if t.kind == "ALL_REDUCE")
        total = sum(t.bytes for t in self.transfers)
        return total - min(summed, self.gradients)

    def fits(self, hbm: int) -> bool:
        return self.memory is not None and self.needed <= hbm

    @property
    def name(self) -> str:
        return f"bucket {self.bucket.name}" if self.bucket else "update"


def plan_bucket(
    program: Program,
    model_config: ModelConfig,
    bucket: Bucket,
    contrast: bool = False,
    beside: Bucket | None = None,
) -> ProgramPlan:
    """Compiles the gradient of one bucket, and of the one in the same step, for the mesh."""
    batch = batch_spec(bucket, model_config, contrast=contrast)
    if beside:
        batch["beside"] = batch_spec(beside, model_config, contrast=contrast)
    return _plan_program(program.lower_gradient(batch), bucket, gradient_bytes(program))


def plan_update(program: Program) -> ProgramPlan:
    """Compiles the update, which is the same for all buckets."""
    return _plan_program(program.lower_update(), None)


def gradient_bytes(program: Program) -> int:
    """Bytes of the float32 gradients that one chip holds."""
    trainable, _ = partition(program.abstract_state.params, program.trainable)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(trainable)]
    return sum(4 * math.prod(shape) for shape in shapes)


def _plan_program(
    lowered: jax.stages.Lowered, bucket: Bucket | None, gradients: int = 0
) -> ProgramPlan:
    begin = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        return ProgramPlan(bucket, time.monotonic() - begin, None, needed, {})
    memory = _memory(compiled.memory_analysis())
    seconds = time.monotonic() - begin
    text = compiled.as_text()
    collectives, transfers = read_collectives(text), find_transfers(text)
    return ProgramPlan(bucket, seconds, memory, memory.peak, collectives, transfers, gradients)


def _memory(analysis: Any) -> Memory:
    """What the compiler says."""
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    host = (
        analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes
        + analysis.host_output_size_in_bytes - analysis.host_alias_size_in_bytes
    )  # fmt: skip
    # Its peak counts the memory of the host as well; this is what is allocated on the chip.
    peak = arguments + outputs + temporaries if host else analysis.peak_memory_in_bytes
    return Memory(arguments, outputs, temporaries, peak, host)


def out_of_memory(message: str) -> int | None:
    """Bytes that the compiler says a program needs, or None if that is not what it says."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def report(plan: ProgramPlan, topology: str, num_slices: int = 1) -> str:
    """Lines for people."""
    chip, _ = parse_topology(topology)
    memory, bucket = plan.memory, plan.bucket
    parts = "the compiler gave up"
    if memory is not None:
        parts = (
            f"arguments {memory.arguments / GIB:.3f}, outputs {memory.outputs / GIB:.3f}, "
            f"temporaries {memory.temporaries / GIB:.3f}"
            + (f", and of the host {memory.host / GIB:.3f}" if memory.host else "")
        )
    verdict = "fits" if plan.fits(chip.hbm) else "DOES NOT FIT"
    shapes = f" {bucket.batch_size} rows, {bucket.frames} frames," if bucket else ""
    kinds = ", ".join(f"{found.count} {kind}" for kind, found in sorted(plan.collectives.items()))
    lines = [
        f"{plan.name}:{shapes} compiled in {plan.seconds:.0f} s",
        f"  memory a chip   peak {plan.needed / GIB:.3f} of {chip.hbm / GIB:.0f} GiB: "
        f"{verdict} ({parts})",
        f"  collectives     {kinds or 'none'}",
    ]
    if num_slices > 1:
        sent = [f"{t.bytes / 1e6:.3f} in {t.count} {t.kind}" for t in plan.transfers]
        lines.append(
            f"  to other slices {' + '.join(sent) or '0'} MB a chip, gradients are "
            f"{plan.gradients / 1e6:.3f}; beside them {plan.beside_gradients / 1e6:.3f} MB"
        )
    return "\n".join(lines)


def report_bound(estimate: Estimate, topology: str, steps: int) -> str:
    """Lines for people about what `steps` steps of a bucket cost at the least."""
    chip, _ = parse_topology(topology)
    line = estimate.roofline(chip)
    sent = sorted(estimate.sent_a_step.items())
    kinds = [f"{kind} {size / 1e9:.3g}" for kind, size in sent if size]
    return "\n".join([
        f"  FLOPs a step    {estimate.model_flops:.4g}",
        f"  sent a step     {', '.join(kinds) or '0'} GB a chip, estimated",
        f"  at least        {1e3 * line.seconds:.3g} ms, by {line.limit} (compute "
        f"{1e3 * line.compute:.3g}, HBM {1e3 * line.hbm:.3g}, ICI {1e3 * line.ici:.3g}): MFU at "
        f"most {100 * line.bound:.0f} %, {steps} steps "
        f"{estimate.chip_hours(chip, steps):.3g} chip-hours on {estimate.chips} chips",
        f"  estimated       {estimate.memory / GIB:.3f} GiB a chip; micro-batches of up to "
        f"{estimate.largest_batch(chip.hbm)} rows fit",
    ])  # fmt: skip


def plan(config: ConfigDict, topology: str, num_slices: int = 1) -> list[ProgramPlan]:
    """Compiles the update and the gradient of every bucket of a config, printing as it goes."""
    mesh = make_mesh(config.mesh.to_dict(), topology_devices(topology, num_slices))
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, mesh)
    where = f"{num_slices} x {topology}, mesh {describe_shape(mesh)}"
    print(f"{where}\n{program.optimizer.report}", flush=True)
    plans = [plan_update(program)]
    print(report(plans[-1], topology, num_slices), flush=True)
    buckets = read_buckets(training_config.to_dict(config)["buckets"], codec)
    named = {bucket.name: bucket for bucket in buckets}
    chip, _ = parse_topology(topology)
    schedule, hours = BucketSchedule(scheduled(buckets)), 0.0
    for bucket in schedule.buckets:
        step = (program, model_config, bucket, needs_contrast(config), named.get(bucket.beside))
        plans.append(plan_bucket(*step))
        print(report(plans[-1], topology, num_slices), flush=True)
        estimate, steps = estimate_step(*step), schedule.occurrences(bucket, config.steps)
        print(report_bound(estimate, topology, steps), flush=True)
        hours += estimate.chip_hours(chip, steps)
    print(f"all {config.steps} steps: at least {hours:.3g} chip-hours on {mesh.size} chips")
    print(f"{len(plans)} programs compiled in {sum(p.seconds for p in plans):.0f} s", flush=True)
    return plans


def main(argv: list[str]) -> None:
    try:
        sys.exit(run(argv))
    except UserError as error:
        sys.exit(report_mistake(error))


def run(argv: list[str]) -> int:
    """The command; returns its exit status: 1 where a program does not fit."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; see --help")
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is missing; give one such as configs/demo.py:stage=1")
    topology = TOPOLOGY.value
    chip, _ = parse_topology(topology)
    training_config.validate(config)
    plans = plan(config, topology, NUM_SLICES.value)
    over = [p for p in plans if not p.fits(chip.hbm)]
    chatty = [p for p in plans if p.beside_gradients > MOST_BESIDE_GRADIENTS]
    for p in chatty:
        print(
            f"{p.name} sends {p.beside_gradients / 1e6:.1f} MB a chip to other slices beside the "
            f"gradients, expected at most {MOST_BESIDE_GRADIENTS / 1e6:.0f}",
            file=sys.stderr,
        )
    for p in over:
        fix = "give mesh.fsdp more chips"
        if p.bucket:
            fix = f"lower buckets.{p.bucket.name}.batch_size, raise accumulation, or {fix}"
        print(
            f"{p.name} needs {p.needed / GIB:.2f} GiB a chip, {topology} has "
            f"{chip.hbm / GIB:.0f}; {fix}",
            file=sys.stderr,
        )
    return 1 if over or chatty else 0


if __name__ == "__main__":
    prepare_environment()
    load_listed()  # before the config file is read
    app.run(main, flags_parser=parse_flags)
