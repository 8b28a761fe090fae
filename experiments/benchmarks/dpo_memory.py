"""Temporary memory of a preference step on TPUs: our layout against the naive one, by `plan`.

    nice -n 15 python -m experiments.benchmarks.dpo_memory \\
        --out experiments/results/benchmarks/dpo_memory.json

The gradient of configs/longva_tpo.py (Qwen2-7B) is compiled twice by libtpu for the same chips,
with the same mesh, pairs a step, model code, rematerialisation and attention kernel, the reference
from a sidecar:

  shared  what `train` runs: a clip is encoded once, both answers are branches of one prefix, and
          log-probabilities are computed at answers alone, in chunks
  naive   two rows a pair, [prefix, chosen] and [prefix, rejected], each with its clip; logits
          float32[2B, L, V] of every position, then log_softmax and a gather

Where the naive program does not fit, the compiler says how much all of it would take. Both programs
have the same arguments (state, batch) and outputs (gradients), so what is left is temporary. The
estimates of both (training/estimate.py) stand beside. A layout that OUT has is not compiled again.
Needs libtpu, no TPU; about ten CPU minutes for a layout that fits, seconds for one that does not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.benchmarks import command_line
from experiments.benchmarks.layouts import with_objective
from experiments.plans import Cell, cell_config, mesh_of, run_steps
from tpo_jax import plan
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.rows import CLIP_FIELDS
from tpo_jax.models.config import ModelConfig
from tpo_jax.objectives.logps import MASKED_LOGIT, TokenScores
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.rules import constrain_rows
from tpo_jax.parallel.topologies import (
    GIB,
    parse_topology,
    prepare_environment,
    topology_devices,
)
from tpo_jax.training.estimate import estimate_step
from tpo_jax.training.objective import Batch, PreferenceObjective, PreferenceScores
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.start import make_model_config

TARGET = 0.35
LAYOUTS = ("shared", "naive")


class NaiveObjective(PreferenceObjective):
    """The same losses, from whole logits of one row an answer."""

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> PreferenceScores:
        if keys is not None:
            raise ValueError("dropout: the naive layout has none; leave config.dropout=0")
        return PreferenceScores(naive_scores(model, batch), None, None, None)


def naive_scores(model: Any, batch: Batch) -> TokenScores:
    """TokenScores float32[B, K, A] of the answer tokens, from logits float32[B * K, L, V]."""
    B, K, R = batch["branch_tokens"].shape
    P, A = batch["prefix_tokens"].shape[1], batch["answer_positions"].shape[2]

    def row(name: str) -> jax.Array:
        prefix = jnp.repeat(batch[f"prefix_{name}"], K, axis=0)
        return jnp.concatenate([prefix, batch[f"branch_{name}"].reshape(B * K, R)], axis=1)

    clip = (constrain_rows(jnp.repeat(batch[name], K, axis=0)) for name in CLIP_FIELDS)
    embeds = model.embed_prefix(tokens := row("tokens"), model.encode(*clip).visual)
    hidden, _ = model.language.prefill(embeds, row("positions"), row("segments"))
    table = model.language.table
    logits = constrain_rows(jnp.einsum(
        "btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    ))  # fmt: skip
    # All rows of the table count, those without a token too: a tokenizer of tests has few.
    used = jnp.arange(table.shape[0]) < model.language.config.num_tokens
    logits = jnp.where(used, logits, MASKED_LOGIT)
    following = jnp.roll(tokens, -1, axis=1)[..., None]
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), following, axis=-1)
    best = jnp.max(logits, axis=-1, keepdims=True)
    correct = jax.lax.stop_gradient(jnp.take_along_axis(logits, following, axis=-1) >= best)
    at = P + batch["answer_positions"].reshape(B * K, A)

    def answers(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x[..., 0], at, axis=1).reshape(B, K, A)

    return TokenScores(answers(logps), answers(correct.astype(jnp.float32)))


def with_naive_layout(program: Program) -> Program:
    """The program whose gradient is the naive one; all else is kept."""
    return with_objective(program, NaiveObjective(program.objective.config))


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of configs/longva_tpo.py on chips; `tiny` has the shapes of tests."""

    topology: str
    frames: int
    tiny: bool = False

    def shapes(self) -> tuple[ConfigDict, ModelConfig, Bucket]:
        """The config, and what both layouts are lowered for."""
        config = cell_config(Cell("longva_tpo", "", self.topology, frames=self.frames), self.tiny)
        model_config, codec = make_model_config(config)
        ((bucket,),) = run_steps(config, codec)[1].values()
        if self.tiny:  # whose config has a length of clip of its own
            bucket = dataclasses.replace(bucket, frames=self.frames)
        return config, model_config, bucket

    def programs(self) -> tuple[dict[str, Program], ModelConfig, Bucket]:
        """{layout: program}, and what both are lowered for."""
        config, model_config, bucket = self.shapes()
        _, sizes = parse_topology(self.topology)
        config.mesh = mesh_of(math.prod(sizes), bucket.batch_size)
        mesh = make_mesh(config.mesh.to_dict(), topology_devices(self.topology))
        shared = make_program(config, model_config, mesh)
        return {"shared": shared, "naive": with_naive_layout(shared)}, model_config, bucket


def compiled(found: plan.ProgramPlan) -> dict[str, Any]:
    """What the file keeps of a compiled program; sizes are bytes of one chip."""
    memory = dataclasses.asdict(found.memory) if found.memory else None
    return {"needed": found.needed, "memory": memory, "seconds": round(found.seconds)}


def temporaries(layouts: dict[str, dict]) -> dict[str, int]:
    """Bytes of one chip by layout. Of what ran out, the total without what all layouts have."""
    known = [made["memory"] for made in layouts.values() if made["memory"]]
    if not known:
        raise RuntimeError(
            f"no layout of {sorted(layouts)} fits, expected at least one; use fewer --frames or "
            "chips with more memory"
        )
    shared = known[0]["arguments"] + known[0]["outputs"]
    found = {}
    for name, made in layouts.items():
        # The compiler's own figure leaves out what a small program keeps beside the HBM.
        counted = made["memory"]["temporaries"] if made["memory"] else 0
        found[name] = max(counted, made["needed"] - shared)
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The ratio, once both layouts are there."""
    found = temporaries(result["layouts"])
    ratio = found["shared"] / found["naive"]
    prefix, branch = result["prefix"], result["branch"]
    estimates = [result["layouts"][name]["estimated"] for name in LAYOUTS]
    return {
        "temporaries": found, "shared / naive": ratio, "target": TARGET, "met": ratio <= TARGET,
        "by estimate": estimates[0] / estimates[1],
        "tokens": (prefix + 2 * branch) / (2 * (prefix + branch)),
    }  # fmt: skip


def run(out: pathlib.Path, case: Case) -> dict[str, Any]:
    """Compiles the layouts that OUT does not have.

    Raises:
      ValueError: OUT is of another case.
    """
    programs, model_config, bucket = case.programs()
    mesh = {axis: size for axis, size in programs["shared"].mesh.shape.items() if size > 1}
    spec = plan.batch_spec(bucket, model_config)
    result: dict[str, Any] = {
        "case": dataclasses.asdict(case), "mesh": mesh, "pairs": bucket.batch_size,
        "prefix": spec["prefix_tokens"].shape[1], "branch": bucket.branch_tokens,
        "vocabulary": model_config.language.vocab_size, "jax": jax.__version__, "layouts": {},
    }  # fmt: skip
    if out.exists():
        stored = json.loads(out.read_text())
        for key in result.keys() - {"layouts"}:
            if stored[key] != result[key]:
                raise ValueError(
                    f"{out}: {key}={stored[key]}, but now it is {result[key]}; give another --out"
                )
        result = stored
    for name in LAYOUTS:
        if name in result["layouts"]:
            continue
        print(f"{name}: compiling", flush=True)
        estimate = estimate_step(programs[name], model_config, bucket)
        made = compiled(plan.plan_bucket(programs[name], model_config, bucket))
        result["layouts"][name] = made | {"estimated": int(estimate.temporaries.base)}
        print(f"  {result['layouts'][name]}", flush=True)
        save(out, result)
    save(out, result | summary(result))
    return result | summary(result)


def save(out: pathlib.Path, result: dict[str, Any]) -> None:
    """The whole file or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, out)


def main() -> None:
    parser = command_line.make_parser("dpo_memory", __doc__)
    parser.add_argument("--topology", default="v5e:8x8")
    parser.add_argument("--frames", type=int, default=64)
    flags = parser.parse_args()
    prepare_environment()
    result = run(flags.out, Case(flags.topology, flags.frames))
    for name, size in result["temporaries"].items():
        print(f"{name:7s} {size / GIB:.2f} GiB of temporaries a chip")
    print(f"shared / naive {result['shared / naive']:.3f}, target {TARGET}; by estimate "
          f"{result['by estimate']:.3f}, tokens {result['tokens']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
