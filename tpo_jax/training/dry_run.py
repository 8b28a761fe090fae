"""Everything about a run that can be known before a pod is paid for, without allocating weights.

Each check reports by itself, so that one look shows all that is wrong.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import Pipeline, read_buckets, row_builder
from tpo_jax.data.rows import Reference, row_id
from tpo_jax.interop import folder
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.context import AXIS
from tpo_jax.parallel.mesh import (
    AXES,
    check_batch_divides,
    check_slices,
    describe_shape,
    mesh_shape,
)
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.rules import partition_spec
from tpo_jax.parallel.topologies import GIB, parse_topology
from tpo_jax.training import checkpoint, sidecar
from tpo_jax.training import config as training_config
from tpo_jax.training.config_changes import changed_since
from tpo_jax.training.estimate import chip_bytes
from tpo_jax.training.program import make_program, needs_contrast, run_as
from tpo_jax.training.start import init_options, make_model_config, may_be_missing

# A sidecar's weights hash is compared where hashing the weights takes seconds.
HASHED_BYTES = GIB


class DryRunError(Exception):
    """Something that would have stopped the run."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check: what was found, or what is wrong."""

    name: str
    good: bool
    text: str
    seconds: float

    def __str__(self) -> str:
        text = self.text.replace("\n", "\n" + " " * 22)
        return f"{'ok' if self.good else 'WRONG':6s}{self.name:16s}{text} ({self.seconds:.1f} s)"


class DryRun:
    """The checks of one config, in the order in which a run would meet what they are about.

    Args:
      config: training config, not validated yet.
      workdir: of the run; "" when it is not decided.
      topology: such as v5e:4x4; "" for the devices here.
      say: told of each finding.
      num_slices: of that topology.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        topology: str,
        say: Callable[[Finding], None],
        num_slices: int = 1,
    ) -> None:
        self.config, self.workdir, self.topology = config, workdir, topology
        self.num_slices = num_slices
        self._say = say
        self.findings: list[Finding] = []

    @property
    def good(self) -> bool:
        return all(finding.good for finding in self.findings)

    def run(self) -> bool:
        """All checks whose preconditions hold; True if nothing is wrong."""
        if not self._check("config", self._config):
            return False
        if not self._check("model", self._model):
            return False
        sharded = self._check("sharding", self._sharding)
        divided = self._check("batches", self._batches)
        self._check("init_from", self._init_from)
        referenced = self._check("references", self._references)
        if sharded and divided and referenced:
            self._check("losses", self._losses)
        read = ("train", "validation") if self.config.eval_every else ("train",)
        for split in read:
            self._check(f"data.{split}", functools.partial(self._data, split))
        if sharded and self.workdir:
            self._check("workdir", self._resume)
        return self.good

    def _check(self, name: str, check: Callable[[], str]) -> bool:
        begin = time.monotonic()
        try:
            good, text = True, check()
        except (ValueError, KeyError, OSError, DryRunError) as error:
            good, text = False, str(error)
        self.findings.append(Finding(name, good, text, time.monotonic() - begin))
        self._say(self.findings[-1])
        return good

    def _config(self) -> str:
        training_config.validate(self.config)
        return f"{self.config.steps} steps of {', '.join(sorted(self.config.buckets))}"

    def _model(self) -> str:
        self.model_config, self.codec = make_model_config(self.config)
        self.params = FunctionalModel(self.model_config).abstract()
        buckets = training_config.to_dict(self.config)["buckets"]
        self.buckets = read_buckets(buckets, self.codec)
        self.reference: Reference | None = None
        leaves = flatten(self.params).values()
        return (
            f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters in {len(leaves)} "
            f"leaves, heads {', '.join(self.model_config.heads) or 'none'}, "
            f"{self.codec.vocab_size} tokens"
        )

    def _sharding(self) -> str:
        """Every leaf has a rule and divides; what a chip holds between two steps."""
        mesh, hbm = self._mesh()
        wrong = []
        for path, leaf in flatten(self.params).items():
            try:
                partition_spec(path, leaf, mesh)
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            raise DryRunError("\n".join(wrong))
        self.program = make_program(self.config, self.model_config, mesh, self._platform)
        held = chip_bytes(self.program.abstract_state)  # between two steps
        limit = f" of {hbm / GIB:.0f}" if hbm else ""
        text = (
            f"mesh {describe_shape(mesh)}; params and optimizer {held / GIB:.2f}{limit} GiB a chip"
        )
        if hbm and held > hbm:
            raise DryRunError(f"{text}; give mesh.fsdp or mesh.tensor more chips")
        return f"{text}\n{self.program.optimizer.report}"

    @property
    def _platform(self) -> str:
        """Of the devices that the run is for."""
        return "tpu" if self.topology else jax.default_backend()

    def _mesh(self) -> tuple[AbstractMesh, int]:
        """(mesh without devices, bytes of a chip or 0)."""
        chips, hbm = jax.device_count() if not self.topology else 0, 0
        if self.topology:
            chip, sizes = parse_topology(self.topology)
            chips, hbm = math.prod(sizes) * self.num_slices, chip.hbm
        shape = mesh_shape(self.config.mesh.to_dict(), chips)
        check_slices(shape, self.num_slices)
        types = (AxisType.Auto,) * len(AXES)
        return AbstractMesh(tuple(shape.values()), AXES, axis_types=types), hbm

    def _batches(self) -> str:
        mesh, _ = self._mesh()
        lines, wrong = [], []
        for bucket in self.buckets:
            spec = batch_spec(bucket, self.model_config)
            try:
                check_batch_divides(spec, mesh, self.config.accumulation)
            except ValueError as error:
                wrong.append(f"buckets.{bucket.name}: {error}")
            try:
                row_builder(self.codec, self.model_config, bucket)
            except ValueError as error:  # not of this model
                wrong.append(str(error))
            prefix, branches = spec["prefix_tokens"].shape[1], spec["branch_tokens"].shape[1:]
            lines.append(
                f"{bucket.name}: {bucket.batch_size} rows of {bucket.frames} frames"
                f"{f' and {bucket.tiles} tiles' if bucket.tiles else ''}, prefix "
                f"{prefix}, branches {branches[0]} x {branches[1]}"
            )
        if wrong:
            raise DryRunError("\n".join(wrong))
        return "\n".join(lines)

    def _init_from(self) -> str:
        config = self.config
        if not config.init_from:
            return "random weights"
        options = init_options(config)
        old = folder.load_config(config.init_from, self.model_config, options)
        missing = folder.check_fits(
            self.params,
            config.init_from,
            init_missing=may_be_missing(config),
            new_tokens=folder.added_tokens(old, self.model_config),
            options=options,
        )
        new = f"; new: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}" * bool(missing)
        return f"{config.init_from} has {len(flatten(self.params)) - len(missing)} leaves{new}"

    def _references(self) -> str:
        """As read_references, with the weights hash left out where hashing takes long."""
        files = self.config.data.references
        if not files:
            return "none"
        bucket, contrast = self.buckets[0], needs_contrast(self.config)
        start, options = epath.Path(self.config.init_from), init_options(self.config)
        small = sum(f.stat().length for f in start.glob("*.safetensors")) <= HASHED_BYTES
        stored = sidecar.read(files[0]).fingerprint
        if small:
            model_config, params, codec = folder.load_model(start, options)
        else:
            model_config, params = folder.load_config(start, options=options), {}
            codec = folder.load_codec(start, options)
        expected = sidecar.Fingerprint.of(
            run_as(self.config, model_config), params, codec, {b.frames for b in self.buckets},
            contrast=contrast, platform=self._platform, context=self._mesh()[0].shape[AXIS],
        )  # fmt: skip
        if not small:
            expected = dataclasses.replace(expected, weights=stored.weights)
        self.reference = sidecar.reference(files, expected, bucket.answers, codec.pad_id)
        unknown = "" if small else "; the weights hash is compared when the run starts"
        return f"{', '.join(files)} belong to {start}{unknown}"

    def _data(self, split: str) -> str:
        """Opens the folders, fits every example into a bucket and builds one row of each bucket."""
        sources = training_config.to_dict(self.config)["data"][split]
        pipeline = Pipeline(
            sources,
            self.codec,
            self.model_config,
            self.model_config.heads,
            self.buckets,
            self.config.seed,
            reference=self.reference,
            evidence=self.config.data.evidence,
            task_text=self.config.data.task_text,
            contrast=needs_contrast(self.config),
        )
        counts = []
        for bucket in self.buckets:
            self._check_row(pipeline, bucket)
            entries = sum(map(len, pipeline.mixtures[bucket.name].entries))
            counts.append(f"{bucket.name}: {entries} clips")
        kinds = pipeline.describe_kinds(self.config.preference.kinds)
        paths = ", ".join(source["path"] for source in sources)
        lines = [paths, ", ".join(counts), pipeline.describe_unseen(), kinds]
        if split == "train":
            lines.append(pipeline.describe_repeats(self.config.steps, self.config.data.epochs))
        return "\n".join(filter(None, lines))

    def _losses(self) -> str:
        """Every loss of the model has a weight, every weight a loss: traces a forward pass of each
        bucket in which other heads run."""
        params = self.program.abstract_state.params
        lines = []
        for bucket in {frozenset(b.idle): b for b in self.buckets[::-1]}.values():
            sums = jax.eval_shape(self.program.eval_step, params, self._spec(bucket))
            lines.append(f"bucket {bucket.name} gives {', '.join(sorted(sums))}")
        return "\n".join(lines)

    def _spec(self, bucket: Bucket) -> Any:
        return batch_spec(
            bucket,
            self.model_config,
            reference=self.reference is not None,
            contrast=needs_contrast(self.config),
        )

    def _check_row(self, pipeline: Pipeline, bucket: Bucket) -> None:
        """The first row has the shapes that the program is compiled for."""
        plan = pipeline.mixtures[bucket.name](0)
        row = flatten(pipeline.row_builders[bucket.name].build(plan, row_id(bucket.name, 0)))
        spec = flatten(self._spec(bucket))
        wrong = [
            f"buckets.{bucket.name}: {path} is {_shape(row.get(path))} in the data and "
            f"{_shape(spec.get(path), 1)} in the program"
            for path in sorted(row.keys() | spec.keys())
            if _shape(row.get(path)) != _shape(spec.get(path), 1)
        ]
        if wrong:
            raise DryRunError("\n".join(wrong))

    def _resume(self) -> str:
        found = checkpoint.check(
            epath.Path(self.workdir) / "checkpoints", self.program.abstract_state
        )
        if found is None:
            return f"{self.workdir}: a new run"
        step, saved = found
        current = training_config.to_dict(self.config)
        if changed := changed_since(saved, current):
            raise DryRunError(f"{self.workdir}: a run with another config:\n" + "\n".join(changed))
        return f"{self.workdir}: resumes at step {step} of {self.config.steps}"


def _shape(leaf: Any, leading: int = 0) -> Sequence[Any] | None:
    """(shape without leading axes, dtype)."""
    return None if leaf is None else (tuple(leaf.shape[leading:]), leaf.dtype.name)
