"""Plans full-size configs for TPU pods: do they fit, and what can they cost at the least?

    python -m experiments.plans --out experiments/results/plans                 # all cells
    python -m experiments.plans --out DIR --only 'longva.* v5e:8x8' --compile 0 # takes minutes less

First every cell is estimated from its traced program (tpo_jax/training/estimate.py), which takes
seconds and decides its mesh and its micro-batches. Then the compiler for its topology gives every
buffer of it a place (experiments/assigned_memory.py), which takes half a minute; where that does
not fit, more micro-batches are tried. At last those on either side of a boundary between frame
counts, and those that fit so narrowly that the assignment may err, are compiled to the end, for
many minutes each.
Each result is written to OUT/plans.json as it comes and README.md is written anew; the same command
goes on where it stopped. Rerun with --fresh after a change of the model. Needs libtpu, no TPU.

`cells` has every config of full size, with the arguments that the head of the table names; it names
those, too, that no cell has. Where the steps of one are of several buckets (videos and images), its
cell is the bucket whose step needs most memory by the estimate; mesh and micro-batches are such
that all of them fit, and chip-hours count the steps of each.
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
from experiments.plan_table import fits, memory_of, page, sure_share, unsure
from tpo_jax import plan
from tpo_jax.data.buckets import Bucket, BucketSchedule, scheduled
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.data.text import TextCodec
from tpo_jax.parallel.collectives import Collective, read_collectives
from tpo_jax.parallel.mesh import AXES, make_mesh
from tpo_jax.parallel.topologies import parse_topology, prepare_environment, topology_devices
from tpo_jax.training import config as training_config
from tpo_jax.training.estimate import Estimate, Traced, estimate_step, trace_step
from tpo_jax.training.families import TOKENIZER
from tpo_jax.training.program import make_program, needs_contrast
from tpo_jax.training.start import make_model_config

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
LORA_RANK, LORA_ALPHA, LORA_RATE, FULL_RATE = 128, 256.0, 2e-4, 2e-5
# Widths of the towers are multiples of 128; 1152 is none of 256. SAM 2 is 288 wide in one stage.
MOST_FSDP, MOST_FSDP_OF_SAM2 = 128, 32
# Chips that share a row, at most.
MOST_CONTEXT = 16
# What a preference config, which starts from a folder, starts from.
BASES = {"longva_tpo": "longva", "llava_video_tpo": "llava_video"}
SMALL = ("v4:2x2x4", "v5e:8x8")
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
    found = [Cell(*c, topology) for c in published for topology in SMALL]
    for config, frames in itertools.product(("llava_video", "longva"), (32, 64, 128)):
        found += [Cell(config, "", pod, frames=frames) for pod in ("v5e:16x16", "v5p:4x4x4")]
    for config in ("llava_onevision", "llava_video", "longva", "video_llava", "videochat2"):
        found.append(Cell(config, "", "v5e:4x4", "lora"))
    # Published, their towers are frozen, and of VideoChat2's language model all but adapters.
    for config, arg in (("video_llava", "stage=2"), ("videochat2", "")):
        found += [Cell(config, arg, topology, "full") for topology in SMALL]
    for config, frames in itertools.product(BASES, (32, 64, 128, 256, 512)):
        smaller = ["v4:2x2x4"] if frames == 32 else []
        found += [Cell(config, "", pod, frames=frames) for pod in [*smaller, *PODS]]
        smaller = ["v5e:4x4"] if frames == 32 else []
        found += [Cell(config, "", pod, "lora", frames) for pod in [*smaller, *PODS]]
    return found + [Cell(*c, topology) for c in _more() for topology in SMALL]


def _more() -> list[tuple[str, str]]:
    """(config, argument): images in as many tiles as a family has, the small OneVision, parts
    without a published whole, and models with heads, whose stage 3_tasks has the programs of 3."""
    stages = ("1", "2_temporal", "2_region", "2_mask", "3")
    heads = itertools.product(("videochat_tpo", "llava_onevision_tpo"), stages)
    return [
        ("llava_onevision", "tiles=36"), ("llava_video", "tiles=36"), ("longva", "tiles=49"),
        ("llava_onevision", "size=0.5b"), ("llava_onevision", "size=0.5b,tiles=36"),
        ("siglip2_qwen3", "stage=1"), ("siglip2_qwen3", "stage=2"), ("seven_b", ""),
        ("videochat2", "tpo"), *((config, f"stage={stage},random") for config, stage in heads),
    ]  # fmt: skip


def cell_config(cell: Cell, tiny: bool = False) -> Any:
    """The training config of a cell, from random weights. `tiny` has the shapes of tests."""
    parts = [cell.arg, "tiny" if tiny else "", f"frames={cell.frames}" if cell.frames else ""]
    get_config = runpy.run_path(str(CONFIGS / f"{cell.config}.py"))["get_config"]
    config = get_config(",".join(filter(None, parts)))
    if cell.config in BASES:
        config.model.preset = f"{BASES[cell.config]}_{'tiny' if tiny else '7b'}"
        config.init_from = ""
        config.time_instruction = BASES[cell.config] == "llava_video"
    config.tokenizer = TOKENIZER  # seven_b's lies with its data
    if cell.trained == "full":
        config.trainable = [[".*", FULL_RATE]]
    if cell.trained == "lora":
        if cell.config != "videochat2":  # which has its own
            config.lora.update(rank=LORA_RANK, alpha=LORA_ALPHA)
        config.trainable = [["language/.*lora_[ab]$", LORA_RATE]]
    return config


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell with as few micro-batches as let the steps of all its buckets fit.

    estimates, steps: {bucket: of its step, and how many the run has}, for buckets with steps.
    """

    mesh: Mesh
    estimates: dict[str, Estimate]
    steps: dict[str, int]

    @property
    def bucket(self) -> str:
        """The one whose step needs most memory."""
        return max(self.estimates, key=lambda name: self.estimates[name].memory)

    @property
    def estimate(self) -> Estimate:
        return self.estimates[self.bucket]


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
        model_config, codec = make_model_config(config)
        schedule, steps = run_steps(config, codec)
        rows, chips = common_rows(steps), math.prod(sizes)
        if cell.config not in BASES:
            most = MOST_FSDP_OF_SAM2 if "sam2" in model_config.heads else MOST_FSDP
            return self._plan(cell, mesh_of(chips, rows, most=most))
        (bucket,) = schedule.buckets
        spare = chips // math.gcd(chips, rows)
        best = self._plan(cell, mesh_of(chips, rows, spare))
        for context in contexts(spare, bucket.frames):
            if best.estimate.memory <= chip.hbm:
                break
            if least_memory(best, context) <= chip.hbm:
                found = self._plan(cell, mesh_of(chips, rows, context))
                best = min(best, found, key=lambda planned: planned.estimate.memory)
        return best

    def split_more(self, cell: Cell, estimate: dict[str, Any]) -> Planned | None:
        """On the mesh of an estimate, in more micro-batches than it; None where there are none."""
        mesh = dict.fromkeys(AXES, 1) | estimate["mesh"]
        config = cell_config(cell, self.tiny)
        rows = common_rows(run_steps(config, make_model_config(config)[1])[1])
        if estimate["accumulation"] == rows // (mesh["data"] * mesh["fsdp"]):
            return None
        return self._plan(cell, mesh, estimate["accumulation"] + 1)

    def _plan(self, cell: Cell, sizes: dict[str, int], least: int = 1) -> Planned:
        """On one mesh, in at least so many micro-batches."""
        chip, _ = parse_topology(cell.topology)
        config = cell_config(cell, self.tiny)
        model_config, codec = make_model_config(config)
        schedule, steps = run_steps(config, codec)
        config.mesh = sizes
        mesh = make_mesh(sizes, topology_devices(cell.topology))
        # As many micro-batches as can be: one row of a chip at a time, or what divides.
        most = common_rows(steps) // (mesh.shape["data"] * mesh.shape["fsdp"])
        config.accumulation = most
        program = make_program(config, model_config, mesh)
        contrast = needs_contrast(config)
        estimates = {}
        for name, buckets in steps.items():
            traced = self._trace(cell, program, model_config, buckets, contrast)
            bucket, *beside = buckets
            estimates[name] = estimate_step(
                program, model_config, bucket, contrast, next(iter(beside), None), traced
            )
        counts = {b.name: schedule.occurrences(b, config.steps) for b in schedule.buckets}
        return Planned(mesh, fewest_micro_batches(estimates, least, most, chip.hbm), counts)

    def _trace(self, cell: Cell, program: Any, model_config: Any, buckets: list, contrast: bool):
        mesh, count = program.mesh, program.accumulation
        row_chips = mesh.shape["data"] * mesh.shape["fsdp"]
        of = (cell.config, cell.arg, cell.trained, cell.frames)
        if self._traced != of:
            self._traced, self._traces = of, {}
        rows = tuple((b.name, b.batch_size // (row_chips * count)) for b in buckets)
        key = (rows, min(count, 2), mesh.shape["context"])
        if key not in self._traces:
            like = next((t for (same, *_), t in self._traces.items() if same == rows), None)
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
        bucket, *beside = run_steps(config, codec)[1][estimate["bucket"]]
        contrast = needs_contrast(config)
        return plan.plan_bucket(program, model_config, bucket, contrast, next(iter(beside), None))


def run_steps(config: Any, codec: TextCodec) -> tuple[BucketSchedule, dict[str, list[Bucket]]]:
    """Which step is of which bucket, and {bucket: it, and the one beside it if there is one}."""
    found = read_buckets(training_config.to_dict(config)["buckets"], codec)
    named = {bucket.name: bucket for bucket in found}
    schedule = BucketSchedule(scheduled(found))
    steps = {b.name: [b, *([named[b.beside]] if b.beside else [])] for b in schedule.buckets}
    return schedule, steps


def common_rows(steps: dict[str, list[Bucket]]) -> int:
    """What the rows of all buckets divide by."""
    return math.gcd(*(bucket.batch_size for buckets in steps.values() for bucket in buckets))


def fewest_micro_batches(
    estimates: dict[str, Estimate], least: int, most: int, hbm: int
) -> dict[str, Estimate]:
    """With as few as let every bucket fit into `hbm` bytes, but `least`; else with `most`."""
    for count in (n for n in range(least, most + 1) if most % n == 0):
        found = {n: dataclasses.replace(e, accumulation=count) for n, e in estimates.items()}
        if all(estimate.memory <= hbm for estimate in found.values()):
            return found
    return estimates


def mesh_of(chips: int, rows: int, context: int = 1, most: int = MOST_FSDP) -> dict[str, int]:
    """Parameters over as many chips as have rows; what is left splits heads and hidden units.

    context: chips that share a row. most: chips that parameters can be split over.
    """
    row_chips = math.gcd(chips // context, rows)
    fsdp = math.gcd(row_chips, most)
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
    """What plans.json keeps of an estimate; others: buckets of which it is not."""
    chip, _ = parse_topology(cell.topology)
    estimate, roofline = planned.estimate, planned.estimate.roofline(chip)
    others = {
        name: {"memory": other.memory, "seconds": other.roofline(chip).seconds,
               "steps": planned.steps[name]}
        for name, other in planned.estimates.items() if name != planned.bucket
    }  # fmt: skip
    return {
        "bucket": planned.bucket, "others": others,
        "memory": estimate.memory, "state": estimate.state, "hbm": chip.hbm,
        "largest_batch": estimate.largest_batch(chip.hbm), "steps": planned.steps[planned.bucket],
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

    They are those between whose frame counts memory ends, of cells that differ in these alone, and
    those that are assigned with so little to spare that the finished program may not fit.
    """
    wanted = []
    for _, group in itertools.groupby(sorted(planned, key=lambda c: c.group), lambda c: c.group):
        row = sorted(group, key=lambda c: c.frames)
        fit = [fill(results[c.name]) <= 1 for c in row]
        for i in range(len(row) - 1):
            wanted += row[i : i + 2] if fit[i] != fit[i + 1] else []
    share = sure_share(results)
    wanted += [c for c in planned if unsure(results[c.name], share)]
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
        _assign(out, cell, planner, results)
    save(out, results)  # what the page says of them may have changed
    for _ in range(compiles):
        todo = boundaries(results, planned)  # anew, for each result may move them
        if not todo:
            break
        cell = todo[0]
        print(f"{cell.name}: compiling", flush=True)
        result = results[cell.name]
        result["compiled"] = compiled(planner.compile(cell, result["estimate"]))
        print(f"  {result['compiled']}", flush=True)
        save(out, results)
    return results


def _assign(out: pathlib.Path, cell: Cell, planner: Planner, results: dict[str, dict]) -> None:
    """In as few micro-batches, from those of the estimate on, as fit."""
    while "assigned" not in results[cell.name] or not fits(results[cell.name]):
        result = results[cell.name]
        if "assigned" in result:
            planned = planner.split_more(cell, result["estimate"])
            if planned is None:
                return
            result = results[cell.name] = {"estimate": estimated(planned, cell)}
            save(out, results)
        result["assigned"] = placed(planner.assign(cell, out))
        print(f"{cell.name}, {result['estimate']['accumulation']} micro-batches: "
              f"{fill(result):.2f} of memory, assigned in {result['assigned']['seconds']} s",
              flush=True)  # fmt: skip
        save(out, results)


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
