"""What does it cost to train task heads together with conversation?

    python -m experiments.task_preference.cost                 # analytic, at 7B; seconds
    python -m experiments.task_preference.cost --measure       # and a step of a smaller model, here

FLOPs of a train step of configs/seven_b.py (SigLIP, Qwen2-7B, light mask head), counted by
tpo_jax/training/flops.py, against the same step of the same model without heads and tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.task_preference import page
from experiments.task_preference.arms import RESULTS
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.evaluation.summary import describe_device, versions
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import cg_detr
from tpo_jax.models.presets import preset
from tpo_jax.models.sam2_config import sam2_size
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import default_config
from tpo_jax.training.flops import forward_flops
from tpo_jax.training.program import make_program

CONFIG = pathlib.Path("configs/seven_b.py")
LOSSES = runpy.run_path(str(CONFIG))["get_config"]().losses.to_dict() | cg_detr.published_weights()
TERA = 1e12
TRAIN_OVER_FORWARD = 3  # everything is trained
ABOUT = (
    "Teraflops of a train step a row of 32 frames (3 x forward, products only), Qwen2-7B and "
    "SigLIP shapes of `configs/seven_b.py`. *heads*: its bucket as it is, 4 questions a row. "
    "*conversation*: the same questions, none to a head. *one question*: conversation that asks "
    "one question a row, so that the other three, which are to heads, are extra. Target: at most "
    "+10 % with the light mask head. Published: 52 against 42 hours of the last stage, about +25 "
    "%, with SAM 2. *sam2 for mask*: SAM 2.1 large sees each of the 32 frames at 1024 x 1024; as "
    "published its weights are frozen, and its share is then about a third of this."
)
STEPS, WIDTH = 5, 512
SAM2_MASK = 28  # side of the masks that configs/videochat_tpo.py trains it on
ONE = "one question"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.task_preference.cost", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--measure", action="store_true", help="time steps on this machine as well")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the measured language model")
    flags = parser.parse_args(arguments)
    record: dict[str, Any] = {
        "command": page.COST_COMMAND, "about": ABOUT, "versions": versions(),
        "analytic": analytic(),
    }  # fmt: skip
    file = flags.results / f"{page.COST}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if flags.measure:
        record["command"] += f" --measure --width={flags.width}"
        record["measured"] = measured(flags.width)
    elif "measured" in known:  # what was measured stays, with what measured it
        record |= {name: known[name] for name in ("command", "measured")}
    page.write(flags.results, page.COST, record)
    print(flags.results / "README.md")


def variants(heads: tuple[str, ...], bucket: Bucket) -> dict[str, tuple[tuple[str, ...], Bucket]]:
    """{name: (heads, bucket)}; the first is what the others cost more than."""
    plain = dataclasses.replace(bucket, slots={})
    return {
        "conversation": ((), plain),
        "heads": (heads, bucket),
        "cg_detr for temporal": (tuple("cg_detr" if h == "temporal" else h for h in heads), bucket),
        ONE: ((), dataclasses.replace(plain, branches=1)),
    }


def analytic() -> dict[str, dict[str, float]]:
    """Teraflops a row by part, and what a step costs over conversation."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    shapes = dict(config.buckets.video.to_dict(), batch_size=1)
    bucket = Bucket.from_config("video", shapes)
    found = {}
    chosen = variants(tuple(config.model.heads), bucket)
    instead = tuple("sam2" if head == "mask" else head for head in config.model.heads)
    chosen["sam2 for mask"] = (instead, dataclasses.replace(bucket, mask_size=SAM2_MASK))
    for name, (heads, one) in chosen.items():
        # Heads of one task share its tokens.
        light = tuple("mask" if head == "sam2" else head for head in heads)
        model_config = preset(config.model.preset, light)
        if "sam2" in heads:
            model_config = dataclasses.replace(
                model_config, heads=heads, sam2=sam2_size("large")
            )  # fmt: skip
        flops = forward_flops(model_config, batch_spec(one, model_config))
        row = {part: TRAIN_OVER_FORWARD * flops[part] / TERA for part in page.PARTS}
        found[name] = row | {"sum": sum(row.values())}
    for row in found.values():
        row["over"] = row["sum"] / found["conversation"]["sum"] - 1
        row["over_one"] = row["sum"] / found[ONE]["sum"] - 1
    return found


def measured(width: int) -> dict[str, Any]:
    """Seconds of a step of the 7B model's kind, narrower, on blank batches; in turn."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    bucket = Bucket.from_config("video", dict(
        config.buckets.video.to_dict(), batch_size=2, frames=8, mask_size=32
    ))  # fmt: skip
    chosen = variants(tuple(config.model.heads), bucket)
    steps = {name: _Step(_narrow(width, heads), one) for name, (heads, one) in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(STEPS + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:  # the first compiles
                times[name].append(seconds)
    rows = {name: {"seconds": statistics.median(values)} for name, values in times.items()}
    for row in rows.values():
        row["over"] = row["seconds"] / rows["conversation"]["seconds"] - 1
        row["over_one"] = row["seconds"] / rows[ONE]["seconds"] - 1
    model = f"language model of width {width}, depth 4, preset tiny otherwise, 2 rows of 8 frames"
    return {"device": describe_device(), "model": model, "steps": STEPS, "rows": rows}


def _narrow(width: int, heads: tuple[str, ...]) -> ModelConfig:
    config = preset("tiny", heads)
    language = dataclasses.replace(
        config.language, width=width, depth=4, heads=width // 64, kv_heads=max(width // 256, 1),
        head_dim=64, mlp_width=3 * width,
    )  # fmt: skip
    return dataclasses.replace(config, language=language)


class _Step:
    """A compiled train step on one blank batch; a call returns its seconds."""

    def __init__(self, model_config: ModelConfig, bucket: Bucket):
        config = default_config()
        config.trainable, config.steps = [[".*", 1e-4]], 1000
        config.losses = {"language": 1.0} | {
            term: weight for term, weight in LOSSES.items()
            if term.split("/")[0] in model_config.heads
        }  # fmt: skip
        self.program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
        self.state = self.program.init_state(self.program.init_params(0))
        spec = batch_spec(bucket, model_config)
        self.batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
        self.key = self.program.base_key(0)

    def __call__(self) -> float:
        begin = time.monotonic()
        self.state, metrics = self.program.train_step(self.state, self.batch, self.key)
        jax.block_until_ready(metrics)
        return time.monotonic() - begin


if __name__ == "__main__":
    main()
