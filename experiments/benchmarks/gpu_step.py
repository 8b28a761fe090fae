"""A step with Qwen2-7B's widths in bfloat16 on one accelerator: tokens a second and MFU.

    python -m experiments.benchmarks.gpu_step --out experiments/results/benchmarks/gpu_step.json
    python -m experiments.benchmarks.gpu_step --objective preference \\
        --out experiments/results/benchmarks/gpu_preference.json

The model is LLaVA-OneVision-7B with fewer layers, so that all of it is trained on one device:
float32 parameters, gradients and moments of AdamW, bfloat16 products, the attention kernel and the
remat that configs of full size have. The program is that of `python -m tpo_jax.train`; the batch is
random videos with an answer each. FLOPs are counted as MFU asks for (tpo_jax/training/flops.py:
without recomputation, attention dense), the peak is the published one of the device, dense
bfloat16. Without a known peak there is no MFU.

With --objective preference there are two answers to each video, and three steps of the same weights
in one run, which take turns:

  shared    what `train` runs: each video and question once, both answers as branches of it
  two_rows  a row for each answer, with its video: everything else is the same program
  sft       each video and question once, and the chosen answer

Reference log-probabilities come with the batch, as from a sidecar. A ratio is taken within a round,
and the median of rounds is reported, beside the ratio of FLOPs; temporary memory is the compiler's
figure for the gradient. Before any measurement both layouts have to agree in the loss.

Neither has run on a GPU yet, both on a CPU alone, on a tiny model.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import command_line
from experiments.benchmarks.layouts import TwoRowsObjective, as_rows, with_objective
from experiments.benchmarks.train_step import Sizes, make_batches
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.models.checks import REMAT
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import default_config
from tpo_jax.training.flops import peak_flops, train_flops
from tpo_jax.training.program import Program, make_program, run_as
from tpo_jax.training.step import TrainStep

RATE = 1e-5
TARGET = 0.45  # MFU on one H100 or H200
# Of the preference step: name of the ratio -> bound, and whether more is better.
RATIOS = {"two_rows / shared": (1.7, True), "shared / sft": (1.15, False)}
MEMORY_TARGET = 0.6  # temporary memory, shared / two_rows
TOLERANCE = 0.02  # relative, of the loss in bfloat16
BETA, SFT = 0.3, 0.5  # of configs/longva_tpo.py
WARM_UP = 2  # steps that are not timed
GIB = 2**30


def stack(layers: int, vision_layers: int) -> ModelConfig:
    """LLaVA-OneVision-7B with so many layers of decoder and tower."""
    whole = preset("llava_onevision_7b")
    return dataclasses.replace(
        whole, language=dataclasses.replace(whole.language, depth=layers),
        vision=dataclasses.replace(whole.vision, depth=vision_layers),
    )  # fmt: skip


def program_of(objective: str, model_config: ModelConfig, steps: int, remat: str) -> Program:
    """Of config.objective, on the first device; all of the model is trained."""
    config = default_config()
    config.objective = objective
    config.preference.update(beta=BETA, sft=SFT)
    config.model.update(attention="auto", remat=remat, dtype="bfloat16")
    config.optimizer.update(warmup=0.0, weight_decay=0.0)
    config.trainable, config.steps = [[".*", RATE]], steps
    return make_program(config, run_as(config, model_config), make_mesh({}, jax.devices()[:1]))


class Case:
    """A compiled step and its batch, which lies on the device.

    Args:
      rows: the batch as the model runs on it, from which tokens and FLOPs are counted; None: it is
        `batch`.
      update: the compiled update of another case; None compiles one.
    """

    def __init__(self, program: Program, batch: Any, rows: Any = None, update: Any = None):
        rows = batch if rows is None else rows
        begin = time.perf_counter()
        self.step = TrainStep(
            program.lower_gradient(batch).compile(), update or program.lower_update().compile()
        )
        self.seconds = time.perf_counter() - begin
        self.batch = jax.device_put(batch, jax.devices()[0])
        self.flops = train_flops(
            program.model.config, rows, program.trainable, program.objective.weights
        )
        self.tokens = rows["prefix_tokens"].size + rows["branch_tokens"].size

    def figures(self, times: Sequence[float], loss: float) -> dict[str, Any]:
        """Of steps that took so many seconds each."""
        seconds, peak = statistics.median(times), peak_flops(jax.devices()[:1])
        memory = self.step.gradient.memory_analysis()
        return {
            "compile seconds": self.seconds, "seconds a step": seconds, "loss": loss,
            "tokens a second": self.tokens / seconds, "FLOPs a step": self.flops,
            "MFU": self.flops / seconds / peak if peak else None,
            "temporary GiB": memory.temp_size_in_bytes / GIB,
        }  # fmt: skip


def run_rounds(
    cases: Mapping[str, Case], program: Program, state: Any, rounds: int
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """{name: figures} and {name: seconds of every round}.

    The state goes from step to step: there is room for one.
    """
    key, losses = program.base_key(0), {}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(WARM_UP + rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            state, metrics = case.step(state, case.batch, key)
            losses[name] = float(metrics["loss"].mean())  # waits for the step
            times[name].append(time.perf_counter() - begin)
    times = {name: found[WARM_UP:] for name, found in times.items()}
    return {name: case.figures(times[name], losses[name]) for name, case in cases.items()}, times


def about(program: Program, remat: str) -> dict[str, Any]:
    """What was measured on what, and the most memory that the device has held."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    return {
        "device": device.device_kind, "attention": program.model.config.language.attention,
        "remat": remat, "parameters": parameters, "peak GiB": memory and memory / GIB,
    }  # fmt: skip


def met(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": TARGET, "met": figures["MFU"] is not None and figures["MFU"] >= TARGET}


def measure(
    model_config: ModelConfig, sizes: Sizes, steps: int, remat: str = "full"
) -> dict[str, Any]:
    """Seconds of a supervised step (median of `steps`), and what follows from them.

    Args:
      sizes: rows, frames and answer of the batch; the rest is the model's.
    """
    program = program_of("sft", model_config, WARM_UP + steps, remat)
    bucket = Bucket("video", "video", sizes.rows, sizes.frames, 1, sizes.answer + 1, sizes.answer)
    ours = types.SimpleNamespace(bucket=bucket, model_config=program.model.config)
    case = Case(program, make_batches(ours, sizes)[0])
    state = program.init_state(program.init_params(0))
    found = run_rounds({"sft": case}, program, state, steps)[0]["sft"]
    return about(program, remat) | found | met(found)


def make_pairs(model_config: ModelConfig, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """A batch of random pairs without padding. The reference's log-probabilities are 0."""
    R, A = sizes.answer + 1, sizes.answer
    bucket = Bucket("pairs", "video", sizes.rows, sizes.frames, 2, R, A, question=sizes.text)
    rng = np.random.default_rng(seed)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_spec(bucket, model_config))
    P = batch["prefix_tokens"].shape[1]
    batch["frames"][:] = rng.integers(0, 256, batch["frames"].shape)
    for name in ("prefix", "branch"):
        batch[f"{name}_tokens"][:] = rng.integers(1, 1000, batch[f"{name}_tokens"].shape)
        batch[f"{name}_segments"][:] = 1
    batch["prefix_positions"][:] = np.arange(P)
    batch["branch_positions"][:] = P + np.arange(R)
    batch["answer_positions"][:] = np.arange(A)
    batch["answer_tokens"][:] = batch["branch_tokens"][:, :, 1:]
    for name in ("frame_valid", "pair_valid", "answer_weights"):
        batch[name][:] = 1
    return batch


def chosen_alone(batch: dict[str, Any]) -> dict[str, Any]:
    """The supervised batch of the same rows."""
    pairs = [name for name in batch if name.startswith(("pair_", "reference_"))]
    return {
        name: x[:, :1] if name.startswith(("branch_", "answer_")) else x
        for name, x in batch.items()
        if name not in pairs
    }


def measure_pairs(
    model_config: ModelConfig, sizes: Sizes, steps: int, remat: str = "full"
) -> dict[str, Any]:
    """The preference step in both layouts and the supervised one; see the module.

    Args:
      sizes: rows (pairs), frames, text (of the question) and answer; the rest is the model's.

    Raises:
      AssertionError: the layouts differ in the loss.
    """
    total = 3 * (WARM_UP + steps)
    program = program_of("preference", model_config, total, remat)
    two_rows = with_objective(program, TwoRowsObjective(program.objective.config))
    batch = make_pairs(program.model.config, sizes)
    cases = {"shared": Case(program, batch)}
    update = cases["shared"].step.update
    cases["two_rows"] = Case(two_rows, batch, as_rows(batch), update)
    sft = program_of("sft", model_config, total, remat)
    cases["sft"] = Case(sft, chosen_alone(batch), update=update)
    state, key = program.init_state(program.init_params(0)), program.base_key(0)
    one, other = (
        float(cases[name].step.gradient(state, cases[name].batch, key)[1]["loss"].mean())
        for name in ("shared", "two_rows")
    )
    if abs(one - other) > TOLERANCE * abs(one):
        raise AssertionError(f"losses differ: shared {one}, two_rows {other}")
    found, times = run_rounds(cases, program, state, steps)
    memory = found["shared"]["temporary GiB"] / found["two_rows"]["temporary GiB"]
    return about(program, remat) | met(found["shared"]) | {
        "prefix over answer": batch["prefix_tokens"].shape[1] / sizes.answer,
        "ratios": [ratio(name, found, times) for name in RATIOS],
        "temporary memory, shared / two_rows": memory, "memory target": MEMORY_TARGET,
        "memory met": memory <= MEMORY_TARGET, "losses before": [one, other], "steps": found,
    }  # fmt: skip


def ratio(
    name: str, found: Mapping[str, dict], times: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """One of RATIOS: median over the rounds and quartiles, and the ratio of FLOPs."""
    above, below = name.split(" / ")
    target, more = RATIOS[name]
    each = [a / b for a, b in zip(times[above], times[below], strict=True)]
    median, quartiles = statistics.median(each), np.quantile(each, [0.25, 0.75]).tolist()
    return {
        "ratio": name, "wall": median, "quartiles": quartiles,
        "FLOPs": found[above]["FLOPs a step"] / found[below]["FLOPs a step"],
        "target": target, "met": median >= target if more else median <= target,
    }  # fmt: skip


def main() -> None:
    parser = command_line.make_parser("gpu_step", __doc__)
    add = parser.add_argument
    add("--objective", choices=("sft", "preference"), default="sft", help="(default: %(default)s)")
    add("--layers", type=int, default=8, help="of the decoder (default: %(default)s)")
    add("--vision_layers", type=int, default=2, help="of the tower (default: %(default)s)")
    add("--rows", type=int, default=4, help="of a batch (default: %(default)s)")
    add("--frames", type=int, default=16, help="of a row, 196 tokens each (default: %(default)s)")
    add("--text", type=int, default=32, help="tokens of the question to a pair, at least "
        "(default: %(default)s)")
    add("--answer", type=int, default=256, help="tokens (default: %(default)s)")
    add("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    add("--remat", choices=REMAT, default="full", help="(default: %(default)s)")
    flags = parser.parse_args()
    sizes = Sizes(rows=flags.rows, frames=flags.frames, text=flags.text, answer=flags.answer)
    run = {"sft": measure, "preference": measure_pairs}[flags.objective]
    found = run(stack(flags.layers, flags.vision_layers), sizes, flags.steps, flags.remat)
    asked = {k: v for k, v in vars(flags).items() if k != "out"}
    record = {"asked": asked, **found, "jax": jax.__version__}
    print(command_line.write_record(flags.out, record))


if __name__ == "__main__":
    main()
