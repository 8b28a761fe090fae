"""What a step needs on chips that are not there, from its trace alone: seconds, not minutes.

    estimate = estimate_step(program, model_config, bucket)
    estimate.memory               # bytes of one chip
    estimate.roofline(chip).seconds

The gradient is traced for the rows of one chip in one micro-batch, and for one row more: memory and
work are linear in rows. Figures that only a compiler knows come from `tpo_jax.plan`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import BATCH_AXES, check_batch_divides
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.topologies import Chip
from tpo_jax.training import memory
from tpo_jax.training.flops import TRAIN_OVER_FORWARD, forward_flops, traced_flops
from tpo_jax.training.program import Program
from tpo_jax.training.step import make_gradient_step

COMPUTE_BYTES = 2  # bfloat16, in which kernels are gathered


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds that a step takes; they cannot all be hidden behind each other's.

    compute: matrix products of one chip, recomputed ones too, at peak. hbm: their operands and
    results, and the optimizer's state, once each. ici: what one chip sends.
    bound: share of peak that the model's FLOPs (training/flops.py) can reach in `seconds`.
    """

    compute: float
    hbm: float
    ici: float
    bound: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.ici)

    @property
    def limit(self) -> str:
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A figure of one micro-batch: `base` with `rows` rows a chip, `slope` more with each row."""

    base: float
    slope: float
    rows: int

    def at(self, rows: float) -> float:
        return self.base + self.slope * (rows - self.rows)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step, on one chip; model_flops alone are those of the global batch.

    state, batch: bytes of parameters and optimizer, and of the rows of a step. temporaries: bytes
    while a gradient is computed, gradients included. flops, products: FLOPs of matrix products, and
    bytes that they read and write. sent: {kind: bytes that are sent for a micro-batch}.
    rows: of a chip in a step, accumulation: micro-batches in which they are taken. row_chips: how
    many chips have rows of their own.
    """

    state: int
    batch: int
    temporaries: Linear
    flops: Linear
    products: Linear
    sent: dict[str, float]
    model_flops: float
    chips: int
    row_chips: int
    rows: int
    accumulation: int

    @property
    def memory(self) -> int:
        """Bytes of one chip."""
        return self.state + self.batch + int(self.temporaries.at(self.rows / self.accumulation))

    def largest_batch(self, hbm: int) -> int:
        """Rows over all chips that fit into `hbm` bytes in one micro-batch; 0 if none do."""
        more = (hbm - self.memory) // max(self.temporaries.slope, 1)
        return int(max(self.rows // self.accumulation + more, 0)) * self.row_chips

    def roofline(self, chip: Chip, sent: float | None = None) -> Roofline:
        """`sent`: bytes that a compiled program sends in a step, where there is one."""
        rows, micros = self.rows / self.accumulation, self.accumulation
        if sent is None:
            sent = micros * sum(self.sent.values())
        compute = micros * self.flops.at(rows) / chip.peak
        # The update reads and writes the state.
        hbm = (micros * self.products.at(rows) + 2 * self.state) / chip.hbm_bandwidth
        ici = sent / chip.ici
        best = self.model_flops / (self.chips * chip.peak)
        return Roofline(compute, hbm, ici, best / max(compute, hbm, ici))


def estimate_step(
    program: Program,
    model_config: ModelConfig,
    bucket: Bucket,
    contrast: bool = False,
    beside: Bucket | None = None,
    traced: Traced | None = None,
) -> Estimate:
    """The gradient of a bucket, of the one in the same step, and the update.

    Args:
      traced: of `trace_step`, where one serves several topologies.

    Raises:
      ValueError: rows do not divide over chips and micro-batches.
    """
    mesh, count = program.mesh, program.accumulation
    buckets = [b for b in (bucket, beside) if b]
    row_chips = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for each in buckets:
        check_batch_divides(batch_spec(each, model_config), mesh, count)
    traced = traced or trace_step(program, model_config, buckets, contrast)
    shares, tensor = _shares(program), mesh.shape["tensor"]
    rows = bucket.batch_size // (row_chips * count)

    def linear(figure: Callable[[Any], float], traces: tuple[Any, Any], share: float) -> Linear:
        base, more = (figure(trace) / share for trace in traces)
        return Linear(base, more - base, rows)

    flops = traced_flops(traced.plain) / tensor
    return Estimate(
        state=_chip_bytes(program.abstract_state),
        batch=traced.batch_bytes // row_chips,
        temporaries=linear(lambda t: memory.peak_bytes(t, shares), traced.gradient, 1),
        flops=Linear(flops, flops / rows, rows),
        products=linear(memory.product_bytes, traced.gradient, tensor * traced.micros),
        sent=_sent(program),
        model_flops=traced.model_flops,
        chips=mesh.size,
        row_chips=row_chips,
        rows=rows * count,
        accumulation=count,
    )


class Traced(NamedTuple):
    """Traces of the gradient on one chip, with the rows of a micro-batch and with a row more.

    gradient: of `micros` micro-batches; more need no more memory. plain: of one, without a row
    more, with attention whose products can be counted. model_flops, batch_bytes: of the global
    batch.
    """

    gradient: tuple[Any, Any]
    plain: Any
    micros: int
    model_flops: float
    batch_bytes: int


def trace_step(
    program: Program, model_config: ModelConfig, buckets: Sequence[Bucket], contrast: bool
) -> Traced:
    mesh, count = program.mesh, program.accumulation
    row_chips = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def spec(bucket: Bucket, rows: int) -> Any:
        sized = dataclasses.replace(bucket, batch_size=rows)
        return batch_spec(sized, model_config, contrast=contrast)

    def trace(more: int, micros: int, plain: bool) -> Any:
        parts = [spec(b, (b.batch_size // (row_chips * count) + more) * micros) for b in buckets]
        batch = parts[0] | ({"beside": parts[1]} if len(parts) > 1 else {})
        return _trace(program, micros, batch, plain)

    micros = min(count, 2)
    whole = [spec(bucket, bucket.batch_size) for bucket in buckets]
    forward = sum(sum(forward_flops(model_config, part).values()) for part in whole)
    return Traced(
        gradient=(trace(0, micros, False), trace(1, micros, False)),
        plain=trace(0, 1, True),
        micros=micros,
        model_flops=TRAIN_OVER_FORWARD * forward,
        batch_bytes=sum(_bytes(part) for part in whole),
    )


def _trace(program: Program, accumulation: int, batch: Any, plain: bool) -> Any:
    """The gradient on one chip. `plain` attention has products that can be counted."""
    model = program.model
    if plain:
        language = dataclasses.replace(model.config.language, attention="xla")
        model = FunctionalModel(dataclasses.replace(model.config, language=language))
    step = make_gradient_step(
        model, program.objective, program.optimizer, accumulation=accumulation
    )
    key = jax.eval_shape(jax.random.key, jnp.uint32(0))
    return jax.make_jaxpr(step)(program.abstract_state, batch, key)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _chip_bytes(state: Any) -> int:
    """Bytes of one chip of leaves with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )


def _shares(program: Program) -> dict[tuple[int, ...], int]:
    """{shape: chips that a parameter of this shape is split over}, and of its gradient."""
    leaves = jax.tree.leaves(program.abstract_state.params)
    return {
        tuple(x.shape): math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves
        if len(x.shape) > 1
    }


def _depth(path: str) -> int:
    """Place of a parameter's part between pixels and losses; what does not see, enters midway."""
    return {"vision": 0, "language": 2, "heads": 3}.get(path.split("/")[0], 1)


def _sent(program: Program) -> dict[str, float]:
    """Least bytes that one chip sends for a micro-batch, by kind.

    A split parameter is gathered for the forward pass and, where a gradient goes through it, again
    for the backward pass; a gradient is summed over all rows.
    """
    mesh = program.mesh
    fsdp, data, tensor = (mesh.shape[axis] for axis in ("fsdp", "data", "tensor"))
    rates = program.optimizer.learning_rates
    first = min(_depth(path) for path in rates)
    sent: collections.Counter = collections.Counter()
    for path, leaf in flatten(program.abstract_state.params).items():
        split = "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
        size = math.prod(leaf.shape) * COMPUTE_BYTES
        if "tensor" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            size /= tensor
        passes = 2 if _depth(path) >= first else 1
        if split and path != "language/embed/table":  # rows are looked up where they are
            sent["all-gather"] += passes * size * (fsdp - 1) / fsdp
        if path in rates:
            kind = "reduce-scatter" if split else "all-reduce"
            chips = fsdp if split else fsdp * data
            sent[kind] += size * (chips - 1) / chips * (1 if split else 2)
            if split and data > 1:
                sent["all-reduce"] += 2 * size / fsdp * (data - 1) / data
    return dict(sent)
