"""What a step needs on chips that are not there, from its trace alone: seconds, not minutes.

    estimate = estimate_step(program, model_config, bucket)
    estimate.memory               # bytes of one chip
    estimate.roofline(chip).seconds

The gradient is traced for the rows of one chip in one micro-batch, and for one row more: memory
and work are linear in rows. Where chips share a row (the axis `context`), what has an axis of its
tokens or frames is divided by them. Figures that only a compiler knows come from `tpo_jax.plan`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.models.attention import SPLASH_BLOCK
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.tiling import visual_frames
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.context import AXIS, ContextLayout
from tpo_jax.parallel.mesh import AXES, BATCH_AXES, check_batch_divides, on_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.topologies import Chip
from tpo_jax.training import memory
from tpo_jax.training.flops import traced_flops, train_flops
from tpo_jax.training.moments import is_on_host
from tpo_jax.training.program import Program
from tpo_jax.training.step import make_gradient_step


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

    @property
    def sent_a_step(self) -> dict[str, float]:
        """{kind: bytes that one chip sends in a step}."""
        return {kind: self.accumulation * size for kind, size in self.sent.items()}

    def roofline(self, chip: Chip) -> Roofline:
        rows, micros = self.rows / self.accumulation, self.accumulation
        compute = micros * self.flops.at(rows) / chip.peak
        # The update reads and writes the state.
        hbm = (micros * self.products.at(rows) + 2 * self.state) / chip.hbm_bandwidth
        ici = sum(self.sent_a_step.values()) / chip.ici
        best = self.model_flops / (self.chips * chip.peak)
        return Roofline(compute, hbm, ici, best / max(compute, hbm, ici))

    def chip_hours(self, chip: Chip, steps: int) -> float:
        """Of `steps` such steps, at the least."""
        return steps * self.roofline(chip).seconds * self.chips / 3600


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
    layouts = [_layout(each, model_config, mesh.shape[AXIS]) for each in buckets]
    tokens = _row_split(buckets, layouts, model_config)
    split = dataclasses.replace(tokens, shapes=_shares(program))
    tensor = mesh.shape["tensor"]
    rows = bucket.batch_size // (row_chips * count)

    def linear(figure: Callable[[Any], float], traces: tuple[Any, Any], share: float) -> Linear:
        base, more = (figure(trace) / share for trace in traces)
        return Linear(base, more - base, rows)

    flops = traced_flops(traced.plain) / (tensor * mesh.shape[AXIS])
    return Estimate(
        state=chip_bytes(program.abstract_state),
        batch=traced.batch_bytes // row_chips,
        temporaries=linear(lambda t: memory.peak_bytes(t, split), traced.gradient, 1),
        flops=Linear(flops, flops / rows, rows),
        products=linear(
            lambda t: memory.product_bytes(t, tokens), traced.gradient, tensor * traced.micros
        ),
        sent=_sent(program, rows * sum(layout.length for layout in layouts)),
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
    program: Program,
    model_config: ModelConfig,
    buckets: Sequence[Bucket],
    contrast: bool,
    like: Traced | None = None,
) -> Traced:
    """`like`: of the same rows a micro-batch on another mesh, whose products are the same."""
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
    gradient = (trace(0, micros, False), trace(1, micros, False))
    if like is not None:
        return like._replace(gradient=gradient, micros=micros)
    whole = [spec(bucket, bucket.batch_size) for bucket in buckets]
    how = program.optimizer.learning_rates, program.objective.weights
    return Traced(
        gradient=gradient,
        plain=trace(0, 1, True),
        micros=micros,
        model_flops=sum(train_flops(model_config, part, *how) for part in whole),
        batch_bytes=sum(_bytes(part) for part in whole),
    )


def _trace(program: Program, accumulation: int, batch: Any, plain: bool) -> Any:
    """The gradient on one chip, or on those that share its rows.

    `plain` attention has products that can be counted, on a chip that has the rows for itself.
    """
    model, context = program.model, program.mesh.shape[AXIS]
    if plain:
        language = dataclasses.replace(model.config.language, attention="dense")
        model = FunctionalModel(dataclasses.replace(model.config, language=language))
    step = make_gradient_step(
        model, program.objective, program.optimizer, accumulation=accumulation
    )
    if context > 1 and not plain:
        sizes = tuple(context if axis == AXIS else 1 for axis in AXES)
        step = on_mesh(step, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    key = jax.eval_shape(jax.random.key, jnp.uint32(0))
    return jax.make_jaxpr(step)(program.abstract_state, batch, key)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def chip_bytes(state: Any) -> int:
    """Bytes of one chip of leaves with shardings; what the host holds is not among them."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if not is_on_host(x)
    )


def _shares(program: Program) -> dict[tuple[int, ...], int]:
    """{shape: chips that a parameter of this shape is split over}, and of its gradient."""
    leaves = jax.tree.leaves(program.abstract_state.params)
    return {
        tuple(x.shape): math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves
        if len(x.shape) > 1
    }


def _layout(bucket: Bucket, model_config: ModelConfig, context: int) -> ContextLayout:
    return ContextLayout(batch_spec(bucket, model_config)["prefix_tokens"].shape[1], context)


def _row_split(
    buckets: Sequence[Bucket], layouts: Sequence[ContextLayout], model_config: ModelConfig
) -> memory.Split:
    """What of a row the chips of `context` split. Branches are left whole."""
    lengths, clips = {}, {}
    for bucket, layout in zip(buckets, layouts, strict=True):
        devices, frames, vision = layout.devices, bucket.frames, model_config.vision
        if devices == 1:
            continue
        # The splash kernel fills up the queries of a chip, and all keys, to whole blocks.
        blocks = [-(-n // SPLASH_BLOCK) * SPLASH_BLOCK
                  for n in (layout.length // devices, layout.length)]  # fmt: skip
        lengths |= dict.fromkeys((layout.tokens, layout.length, *blocks), devices)
        visual = len(visual_frames(model_config, frames, bucket.tiles))
        for views in (frames, bucket.tiles):
            if vision.per_frame and views and views % devices == 0:
                clips[views] = devices
                lengths |= dict.fromkeys((views * vision.grid**2, visual), devices)
    return memory.Split(lengths=lengths, clips=clips)


def _depth(path: str) -> int:
    """Place of a parameter's part between pixels and losses; what does not see, enters midway."""
    return {"vision": 0, "language": 2, "heads": 3}.get(path.split("/")[0], 1)


def _sent(program: Program, tokens: int) -> dict[str, float]:
    """Least bytes that one chip sends for a micro-batch, by kind.

    A split parameter is gathered for the forward pass and, where a gradient goes through it, again
    for the backward pass; a gradient is summed over all rows, and over the parts of each. So are
    keys and values of the `tokens` of a chip's prefixes, where it shares them. All travel in the
    dtype that the model computes in.
    """
    mesh, item = program.mesh, jnp.dtype(program.model.config.dtype).itemsize
    fsdp, tensor, context = (mesh.shape[axis] for axis in ("fsdp", "tensor", AXIS))
    copies = mesh.shape["data"] * context
    rates = program.optimizer.learning_rates
    first = min(_depth(path) for path in rates)
    sent: collections.Counter = collections.Counter()
    for path, leaf in flatten(program.abstract_state.params).items():
        split = "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
        size = math.prod(leaf.shape) * item
        if "tensor" in jax.tree.leaves(tuple(leaf.sharding.spec)):
            size /= tensor
        passes = 2 if _depth(path) >= first else 1
        if split and path != "language/embed/table":  # rows are looked up where they are
            sent["all-gather"] += passes * size * (fsdp - 1) / fsdp
        if path in rates:
            kind = "reduce-scatter" if split else "all-reduce"
            chips = fsdp if split else fsdp * copies
            sent[kind] += size * (chips - 1) / chips * (1 if split else 2)
            if split and copies > 1:
                sent["all-reduce"] += 2 * size / fsdp * (copies - 1) / copies
    if context > 1:
        language = program.model.config.language
        heads = 2 * language.kv_heads * language.head_dim
        size = language.depth * tokens * heads * item * (context - 1) / context
        sent["all-gather"] += size * (2 if language.remat else 1)
        sent["reduce-scatter"] += size
    return dict(sent)
