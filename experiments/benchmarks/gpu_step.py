"""A supervised step with Qwen2-7B's widths in bfloat16 on one accelerator: tokens a second and MFU.

    python -m experiments.benchmarks.gpu_step --out experiments/results/benchmarks/gpu_step.json

The model is LLaVA-OneVision-7B with fewer layers, so that all of it is trained on one device:
float32 parameters, gradients and moments of AdamW, bfloat16 products, the attention kernel and the
remat that configs of full size have. The program is that of `python -m tpo_jax.train`; the batch is
random videos with an answer each. FLOPs are counted as MFU asks for (tpo_jax/training/flops.py:
without recomputation, attention dense), the peak is the published one of the device, dense
bfloat16. Without a known peak there is no MFU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
import types
from typing import Any

import jax

from experiments.benchmarks.train_step import Sizes, make_batches
from tpo_jax.data.buckets import Bucket
from tpo_jax.models.checks import REMAT
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import default_config
from tpo_jax.training.flops import peak_flops, train_flops
from tpo_jax.training.program import make_program, run_as

RATE = 1e-5
TARGET = 0.45  # MFU on one H100 or H200
WARM_UP = 2  # steps that are not timed
GIB = 2**30


def stack(layers: int, vision_layers: int) -> ModelConfig:
    """LLaVA-OneVision-7B with so many layers of decoder and tower."""
    whole = preset("llava_onevision_7b")
    return dataclasses.replace(
        whole, language=dataclasses.replace(whole.language, depth=layers),
        vision=dataclasses.replace(whole.vision, depth=vision_layers),
    )  # fmt: skip


def measure(
    model_config: ModelConfig, sizes: Sizes, steps: int, remat: str = "full"
) -> dict[str, Any]:
    """Seconds of a step (median of `steps`), and what follows from them, on the first device.

    Args:
      sizes: rows, frames and answer of the batch; the rest is the model's.
    """
    config = default_config()
    config.model.update(attention="auto", remat=remat, dtype="bfloat16")
    config.optimizer.update(warmup=0.0, weight_decay=0.0)
    config.trainable, config.steps = [[".*", RATE]], WARM_UP + steps
    devices = jax.devices()[:1]
    program = make_program(config, run_as(config, model_config), make_mesh({}, devices))
    model_config = program.model.config
    bucket = Bucket("video", "video", sizes.rows, sizes.frames, 1, sizes.answer + 1, sizes.answer)
    ours = types.SimpleNamespace(bucket=bucket, model_config=model_config)
    batch, _ = make_batches(ours, sizes)
    begin = time.perf_counter()
    compiled = program.compile_train_step(batch)
    compiling = time.perf_counter() - begin
    batch = jax.device_put(batch, devices[0])
    state, key = program.init_state(program.init_params(0)), program.base_key(0)
    times = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        loss = float(metrics["loss"].mean())  # waits for the step
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[WARM_UP:])
    flops = train_flops(model_config, batch, program.trainable)
    peak = peak_flops(devices)
    mfu = flops / seconds / peak if peak else None
    memory = (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": devices[0].device_kind, "attention": model_config.language.attention,
        "remat": remat, "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "compile seconds": compiling, "seconds a step": seconds, "loss": loss,
        "tokens a second": (batch["prefix_tokens"].size + batch["branch_tokens"].size) / seconds,
        "FLOPs a step": flops, "MFU": mfu, "target": TARGET,
        "met": mfu is not None and mfu >= TARGET,
        "peak GiB": memory and memory / GIB,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="JSON file to write")
    add("--layers", type=int, default=8, help="of the decoder (default: %(default)s)")
    add("--vision_layers", type=int, default=2, help="of the tower (default: %(default)s)")
    add("--rows", type=int, default=4, help="of a batch (default: %(default)s)")
    add("--frames", type=int, default=16, help="of a row, 196 tokens each (default: %(default)s)")
    add("--answer", type=int, default=256, help="tokens (default: %(default)s)")
    add("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    add("--remat", choices=REMAT, default="full", help="(default: %(default)s)")
    flags = parser.parse_args()
    sizes = Sizes(rows=flags.rows, frames=flags.frames, answer=flags.answer)
    found = measure(stack(flags.layers, flags.vision_layers), sizes, flags.steps, flags.remat)
    asked = {k: v for k, v in vars(flags).items() if k != "out"}
    text = json.dumps({"asked": asked, **found, "jax": jax.__version__}, indent=2)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
