"""Plans full-size configs for TPU pods: do they fit, and what can they cost at the least?

    python -m experiments.plans --out experiments/results/plans                 # all cells
    python -m experiments.plans --out DIR --only 'longva.* v5e:8x8' --compile 0 # takes minutes less

First every cell is estimated from its traced program (tpo_jax/training/estimate.py), which takes
seconds and decides its mesh and its micro-batches. Then the compiler for its topology gives every
buffer of it a place (experiments/assigned_memory.py), which takes half a minute. At last those on
either side of a boundary between frame counts are compiled to the end, for many minutes each.
Each result is written to OUT/plans.json as it comes and README.md is written anew; the same command
goes on where it stopped. Rerun with --fresh after a change of the model. Needs libtpu, no TPU.

`cells` are the published families and the preference configs of two of them, each at its step of
videos or pairs; what is left out stands in plan_table.NOT_PLANNED.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import runpy
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.assigned_memory import Assigned, assigned
from experiments.plan_table import memory_of, page
from tpo_jax import plan
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.data.text import TextCodec
from tpo_jax.parallel.collectives import Collective, read_collectives
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.topologies import parse_topology, prepare_environment, topology_devices
from tpo_jax.training import config as training_config
from tpo_jax.training.estimate import Estimate, Traced, estimate_step, trace_step
from tpo_jax.training.families import TOKENIZER
from tpo_jax.training.program import make_program, needs_contrast
from tpo_jax.training.start import make_model_config

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
LORA_RANK, LORA_ALPHA, LORA_RATE, FULL_RATE = 128, 256.0, 2e-4, 2e-5
# Widths of the towers are multiples of 128; 1152 is none of 256.
MOST_FSDP = 128
# Chips that share a row, at most.
MOST_CONTEXT = 16
# What a preference config, which starts from a folder, starts from.
BASES = {"longva_tpo": "longva", "llava_video_tpo": "llava_video"}
PODS = ("v5e:8x8", "v5e:16x16", "v4:2x4x4", "v5p:2x4x4")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One config on one topology.

    config: file in configs/ and `arg` its argument. trained: what the config trains ("published"),
    adapters on the language model alone ("lora"), or every leaf ("full"). frames: 0 for the
    config's own.
    """

    config: str
    arg: str
    topology: str
    trained: str = "published"
    frames: int = 0

    @property
    def name(self) -> str:
        frames = f"frames={self.frames}" if self.frames else ""
        arg = ",".join(filter(None, (self.arg, frames)))
        return f"{self.config}{':' if arg else ''}{arg} {self.trained} {self.topology}"

    @property
    def group(self) -> tuple:
        """Cells that differ in frames alone."""
        return self.config, self.arg, self.topology, self.trained


def cells() -> list[Cell]:
    """Everything that is planned."""
    published = [
        ("llava_onevision", ""), ("llava_video", ""), ("longva", ""), ("video_llava", "stage=1"),
        ("video_llava", "stage=2"), ("videochat2", ""), ("longva_tpo", "recipe=hound"),
        ("longva_tpo", "recipe=realign"), ("longva_tpo", "recipe=mdpo"),
    ]  # fmt: skip
    found = [Cell(*c, topology) for c in published for topology in ("v4:2x2x4", "v5e:8x8")]
    for config, frames in itertools.product(("llava_video", "longva"), (32, 64, 128)):
        found += [Cell(config, "", pod, frames=frames) for pod in ("v5e:16x16", "v5p:4x4x4")]
    for config in ("llava_onevision", "llava_video", "longva", "video_llava", "videochat2"):
        found.append(Cell(config, "", "v5e:4x4", "lora"))
    # Published, their towers are frozen, and of VideoChat2's language model all but adapters.
    for config, arg in (("video_llava", "stage=2"), ("videochat2", "")):
        found += [Cell(config, arg, topology, "full") for topology in ("v4:2x2x4", "v5e:8x8")]
    for config, frames in itertools.product(BASES, (32, 64, 128, 256, 512)):
        smaller = ["v4:2x2x4"] if frames == 32 else []
        found += [Cell(config, "", pod, frames=frames) for pod in [*smaller, *PODS]]
        smaller = ["v5e:4x4"] if frames == 32 else []
        found += [Cell(config, "", pod, "lora", frames) for pod in [*smaller, *PODS]]
    return found


def cell_config(cell: Cell, tiny: bool = False) -> Any:
    """The training config of a cell, from random weights. `tiny` has the shapes of tests."""
    parts = [cell.arg, "tiny" if tiny else "", f"frames={cell.frames}" if cell.frames else ""]
    get_config = runpy.run_path(str(CONFIGS / f"{cell.config}.py"))["get_config"]
    config = get_config(",".join(filter(None, parts)))
    if cell.config in BASES:
        config.model.preset = f"{BASES[cell.config]}_{'tiny' if tiny else '7b'}"
        config.init_from, config.tokenizer = "", TOKENIZER
        config.time_instruction = BASES[cell.config] == "llava_video"
    if cell.trained == "full":
        config.trainable = [[".*", FULL_RATE]]
    if cell.trained == "lora":
        if cell.config != "videochat2":  # which has its own
            config.lora.update(rank=LORA_RANK, alpha=LORA_ALPHA)
        config.trainable = [["language/.*lora_[ab]$", LORA_RATE]]
    return config


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell's estimate, with micro-batches as large as fit, and the steps of its run."""

    mesh: Mesh
    estimate: Estimate
    steps: int


class Planner:
    """Builds programs; traces are kept while cells of one config follow each other."""

    def __init__(self, tiny: bool = False) -> None:
        self.tiny = tiny
        self._traced: tuple = ()  # what the traces are of
        self._traces: dict[tuple, Traced] = {}

    def plan(self, cell: Cell) -> Planned:
        """On the mesh with the fewest chips to a row that fits; else of those tried, the least.

        Chips share rows in preference configs alone, whose rows are whole clips of any length. A
        mesh is not tried that cannot fit by what the one before it showed.
        """
        chip, sizes = parse_topology(cell.topology)
        config = cell_config(cell, self.tiny)
        bucket, beside = step_buckets(config, make_model_config(config)[1])
        rows = math.gcd(bucket.batch_size, beside.batch_size if beside else 0)
        chips = math.prod(sizes)
        if cell.config not in BASES:
            return self._plan(cell, mesh_of(chips, rows))
        spare = chips // math.gcd(chips, rows)
        best = self._plan(cell, mesh_of(chips, rows, spare))
        for context in contexts(spare, bucket.frames):
            if best.estimate.memory <= chip.hbm:
                break
            if least_memory(best, context) <= chip.hbm:
                found = self._plan(cell, mesh_of(chips, rows, context))
                best = min(best, found, key=lambda planned: planned.estimate.memory)
        return best

    def _plan(self, cell: Cell, sizes: dict[str, int]) -> Planned:
        """On one mesh."""
        chip, _ = parse_topology(cell.topology)
        config = cell_config(cell, self.tiny)
        model_config, codec = make_model_config(config)
        bucket, beside = step_buckets(config, codec)
        buckets = [b for b in (bucket, beside) if b]
        rows = math.gcd(*(b.batch_size for b in buckets))
        config.mesh = sizes
        mesh = make_mesh(sizes, topology_devices(cell.topology))
        # As many micro-batches as can be: one row of a chip at a time, or what divides.
        config.accumulation = most = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
        program = make_program(config, model_config, mesh)
        contrast = needs_contrast(config)
        traced = self._trace(cell, program, model_config, buckets, contrast)
        estimate = estimate_step(program, model_config, bucket, contrast, beside, traced)
        counts = [n for n in range(1, most + 1) if most % n == 0]
        fewest = [dataclasses.replace(estimate, accumulation=n) for n in counts]
        return Planned(
            mesh, next((e for e in fewest if e.memory <= chip.hbm), estimate), config.steps
        )

    def _trace(self, cell: Cell, program: Any, model_config: Any, buckets: list, contrast: bool):
        mesh, count = program.mesh, program.accumulation
        row_chips = mesh.shape["data"] * mesh.shape["fsdp"]
        micro = tuple(b.batch_size // (row_chips * count) for b in buckets)
        of = (cell.config, cell.arg, cell.trained, cell.frames, micro)
        if self._traced != of:
            self._traced, self._traces = of, {}
        key = (min(count, 2), mesh.shape["context"])
        if key not in self._traces:
            like = next(iter(self._traces.values()), None)
            self._traces[key] = trace_step(program, model_config, buckets, contrast, like)
        return self._traces[key]

    def assign(self, cell: Cell, out: pathlib.Path) -> Assigned:
        """The memory and the program of a cell that is estimated in `out`, without its code."""
        which = json.dumps(dataclasses.asdict(cell))
        tiny = ["--tiny"] if self.tiny else []
        command = ["-m", "experiments.plans", "--out", str(out), "--gradient", which, *tiny]
        return assigned([sys.executable, *command])

    def compile(self, cell: Cell, estimate: dict[str, Any]) -> plan.ProgramPlan:
        """The gradient of a cell by the compiler for its chips, on the mesh of its estimate."""
        config = cell_config(cell, self.tiny)
        config.accumulation = estimate["accumulation"]
        model_config, codec = make_model_config(config)
        mesh = make_mesh(estimate["mesh"], topology_devices(cell.topology))
        program = make_program(config, model_config, mesh)
        bucket, beside = step_buckets(config, codec)
        return plan.plan_bucket(program, model_config, bucket, needs_contrast(config), beside)


def step_buckets(config: Any, codec: TextCodec) -> tuple[Any, Any]:
    """The bucket of a config's step, and the one beside it or None."""
    found = read_buckets(training_config.to_dict(config)["buckets"], codec)
    buckets = {bucket.name: bucket for bucket in found}
    first = buckets.get("video") or buckets["pairs"]
    return first, buckets.get(first.beside)


def mesh_of(chips: int, rows: int, context: int = 1) -> dict[str, int]:
    """Parameters over as many chips as have rows; what is left splits heads and hidden units.

    context: chips that share a row.
    """
    row_chips = math.gcd(chips // context, rows)
    fsdp = math.gcd(row_chips, MOST_FSDP)
    return {
        "data": row_chips // fsdp, "fsdp": fsdp, "context": context,
        "tensor": chips // (context * row_chips),
    }  # fmt: skip


def contexts(spare: int, frames: int) -> list[int]:
    """How many chips may share a row of `frames` frames, beyond the `spare` that do anyway."""
    found = [spare * 2**n for n in range(1, MOST_CONTEXT.bit_length())]
    return [n for n in found if n <= MOST_CONTEXT and frames % n == 0]


def least_memory(planned: Planned, context: int) -> float:
    """Bytes that a chip needs at the least if `context` chips share a row: activations are split
    further, and the state over fewer."""
    estimate, times = planned.estimate, context / planned.mesh.shape["context"]
    return estimate.state * times + estimate.temporaries.base / times


def estimated(planned: Planned, cell: Cell) -> dict[str, Any]:
    """What plans.json keeps of an estimate."""
    chip, _ = parse_topology(cell.topology)
    estimate, roofline = planned.estimate, planned.estimate.roofline(chip)
    return {
        "memory": estimate.memory, "state": estimate.state, "hbm": chip.hbm,
        "largest_batch": estimate.largest_batch(chip.hbm), "steps": planned.steps,
        "batch": estimate.rows * estimate.row_chips, "accumulation": estimate.accumulation,
        "mesh": {axis: size for axis, size in planned.mesh.shape.items() if size > 1},
        "chips": estimate.chips, "flops": estimate.model_flops,
        "sent": estimate.sent_a_step,
        "roofline": dataclasses.asdict(roofline),
    }  # fmt: skip


def compiled(found: plan.ProgramPlan) -> dict[str, Any]:
    """What plans.json keeps of a compiled program; no collectives if memory ran out."""
    return _made(found.needed, found.seconds, found.memory is None, found.collectives)


def placed(found: Assigned) -> dict[str, Any]:
    """The same of a program whose buffers have their places."""
    return _made(found.memory, found.seconds, found.ran_out, read_collectives(found.text))


def _made(
    memory: int, seconds: float, ran_out: bool, collectives: dict[str, Collective]
) -> dict[str, Any]:
    return {
        "memory": memory, "seconds": round(seconds), "ran_out": ran_out,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in collectives.items()},
        "jax": jax.__version__,
    }  # fmt: skip


def boundaries(results: dict[str, dict], planned: list[Cell]) -> list[Cell]:
    """Cells worth compiling that are not compiled yet, those nearest to a chip's memory first.

    They are those between whose frame counts memory ends, of cells that differ in these alone.
    """
    wanted = []
    for _, group in itertools.groupby(sorted(planned, key=lambda c: c.group), lambda c: c.group):
        row = sorted(group, key=lambda c: c.frames)
        fit = [fill(results[c.name]) <= 1 for c in row]
        for i in range(len(row) - 1):
            wanted += row[i : i + 2] if fit[i] != fit[i + 1] else []
    todo = [c for c in dict.fromkeys(wanted) if "compiled" not in results[c.name]]
    return sorted(todo, key=lambda c: abs(math.log(fill(results[c.name]))))


def fill(result: dict[str, Any]) -> float:
    """Memory needed over memory there, as far as it is known."""
    return memory_of(result) / result["estimate"]["hbm"]


def save(out: pathlib.Path, results: dict[str, dict]) -> None:
    """Whole files or none."""
    for name, text in (("plans.json", json.dumps(results, indent=1) + "\n"),
                       ("README.md", page(results))):  # fmt: skip
        part = out / f"{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def run(
    out: pathlib.Path, planned: list[Cell], compiles: int, planner: Planner, fresh: bool = False
) -> dict[str, dict]:
    """Estimates and assigns what is not, then compiles at most `compiles` cells."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plans.json"
    results = json.loads(path.read_text()) if path.exists() and not fresh else {}
    for cell in planned:
        if cell.name not in results:
            begin = time.monotonic()
            results[cell.name] = {"estimate": estimated(planner.plan(cell), cell)}
            print(f"{cell.name}: {fill(results[cell.name]):.2f} of memory, estimated in "
                  f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
            save(out, results)
    for cell in planned:
        if "assigned" not in results[cell.name]:
            results[cell.name]["assigned"] = placed(planner.assign(cell, out))
            print(f"{cell.name}: {fill(results[cell.name]):.2f} of memory, assigned in "
                  f"{results[cell.name]['assigned']['seconds']} s", flush=True)  # fmt: skip
            save(out, results)
    for cell in boundaries(results, planned)[:compiles]:
        print(f"{cell.name}: compiling", flush=True)
        result = results[cell.name]
        result["compiled"] = compiled(planner.compile(cell, result["estimate"]))
        print(f"  {result['compiled']}", flush=True)
        save(out, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results")
    parser.add_argument("--only", default="", help="regex of cells: 'CONFIG:ARG TRAINED TOPOLOGY'")
    parser.add_argument("--compile", type=int, default=1000, help="most cells to compile")
    parser.add_argument("--fresh", action="store_true", help="forget what OUT has")
    # Of the process that is ended before it has generated the code of a cell; see Planner.assign.
    parser.add_argument("--gradient", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    prepare_environment()
    if flags.gradient:
        cell = Cell(**json.loads(flags.gradient))
        results = json.loads((flags.out / "plans.json").read_text())
        Planner(flags.tiny).compile(cell, results[cell.name]["estimate"])
        return
    planned = [cell for cell in cells() if re.search(flags.only, cell.name)]
    if not planned:
        parser.error(f"--only={flags.only!r} matches no cell, such as {cells()[0].name!r}")
    run(flags.out, planned, flags.compile, Planner(flags.tiny), flags.fresh)


if __name__ == "__main__":
    main()
