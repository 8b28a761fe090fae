"""What a supervised step costs: against PyTorch, in Python, and to compile.

    python -m experiments.benchmarks.train_step --out experiments/results/benchmarks/train_step.json

The model has LLaVA-OneVision's parts: SigLIP on every frame, two matrices, bilinear pooling, Qwen2.
One set of weights, one batch of videos with an answer each; a step is forward, backward, clipping
and AdamW in float32. `ours` is the program of `python -m tpo_jax.train`; `torch` is
LlavaOnevisionForConditionalGeneration of `transformers` with its scaled_dot_product_attention and
logits of the answer alone, in every setting of SETTINGS. Before any measurement the losses of three
steps have to agree.

  step      rounds run each twice, of which the second is timed, one after the other in turning
            order; a ratio is taken within a round, and the median of rounds is reported, in wall
            and in CPU time of the process, to the setting of PyTorch that is fastest in that time,
            which the row names; beside it, once: seconds to lower and to compile our two programs,
            and of each setting's first step, which under torch.compile holds the compiling of its
            model and of the backward pass
  memory    peak resident set of a process that does one side, over what it holds between steps
            (parameters and state of the optimizer on both sides), to the least of the settings
  dispatch  from the call of a compiled step to its return, with a body that does nothing on the
            same pytrees (state and batch of the step), the state donated
  compile   seconds to lower and compile both programs of a config's tiny variant, on one device

JAX keeps no compile cache and PyTorch's starts empty. Compile times are printed as a table of
Markdown, too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait burn no CPU time

import jax
import numpy as np

from experiments.benchmarks import command_line
from experiments.benchmarks.dpo_step import measure, versions
from experiments.benchmarks.torch_settings import (
    ALLOCATOR,
    SETTINGS,
    process_settings,
    require_cpu,
    usable_settings,
)
from experiments.plans import Cell, cell_config
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket, scheduled
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.interop.families.registry import family_of, to_leaves
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.towers.registry import normalise_pixels
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import unflatten
from tpo_jax.training import config as training_config
from tpo_jax.training.program import Program, make_program, needs_contrast
from tpo_jax.training.start import make_model_config
from tpo_jax.training.step import TrainStep

RATE, CLIP, EPSILON = 1e-4, 1.0, 1e-8
TOLERANCE = 2e-3  # relative, of the loss of three steps
PARTS = ("step", "memory", "dispatch", "compile")
VIDEO_ID, IMAGE_ID = 1022, 1023
# {config: its argument beside `tiny`}.
CONFIGS = {
    "llava_onevision": "", "llava_video": "", "longva": "", "video_llava": "", "videochat2": "",
    "siglip2_qwen3": "", "seven_b": "", "longva_tpo": "", "llava_video_tpo": "",
    "videochat_tpo": "stage=3,random", "llava_onevision_tpo": "stage=3,random",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of a batch. image: side of a frame in pixels. head_dim: of the language model, which
    has half as many key/value heads as heads. text: tokens around the video."""

    rows: int = 2
    frames: int = 8
    image: int = 112
    width: int = 256
    depth: int = 4
    head_dim: int = 32
    vision_width: int = 192
    vision_depth: int = 4
    text: int = 32
    answer: int = 32


def published_config(sizes: Sizes) -> dict[str, Any]:
    """config.json of the model, in the layout of `transformers`."""
    return {
        "model_type": "llava_onevision",
        "text_config": {
            "model_type": "qwen2", "vocab_size": 1024, "hidden_size": sizes.width,
            "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.width // sizes.head_dim,
            "num_key_value_heads": sizes.width // (2 * sizes.head_dim),
            "intermediate_size": 3 * sizes.width,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "vision_use_head": False,
            "image_size": sizes.image, "patch_size": 14, "hidden_size": sizes.vision_width,
            "num_hidden_layers": sizes.vision_depth, "num_attention_heads": 6,
            "intermediate_size": 4 * sizes.vision_width,
        },
        "vision_feature_layer": -1, "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[sizes.image, sizes.image]],
    }  # fmt: skip


class Torch:
    """The model in PyTorch in one of SETTINGS."""

    def __init__(self, sizes: Sizes, threads: int, setting: str = "eager", seed: int = 0):
        import torch
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.torch, self.sizes = torch, sizes
        data = {k: v for k, v in published_config(sizes).items() if k != "model_type"}
        self.model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
            **data, image_token_index=IMAGE_ID, video_token_index=VIDEO_ID,
            attn_implementation="sdpa",
        )).train()  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=EPSILON,
            weight_decay=0.0, fused=SETTINGS[setting]["fused"],
        )  # fmt: skip
        if SETTINGS[setting]["compiled"]:
            self.run = torch.compile(self.model)
        else:
            self.run = self.model

    def step(self, batch: dict[str, Any]) -> float:
        torch, kept = self.torch, self.sizes.answer + 1
        out = self.run(
            input_ids=batch["ids"], pixel_values_videos=batch["pixels"], logits_to_keep=kept,
            use_cache=False,
        )  # fmt: skip
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch["ids"][:, -self.sizes.answer :].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Ours:
    """The program of `train`, from PyTorch's weights or new ones."""

    def __init__(self, sizes: Sizes, tensors: dict[str, np.ndarray] | None = None):
        data = published_config(sizes)
        family = family_of(data)
        self.model_config = family.model_config(data, {})
        config = training_config.default_config()
        config.optimizer = {
            "name": "adamw", "warmup": 0.0, "weight_decay": 0.0, "clip": CLIP, "min_lr_ratio": 1.0,
        }  # fmt: skip
        config.trainable = [[".*", RATE]]
        self.program = make_program(config, self.model_config, make_mesh({}, jax.devices()[:1]))
        if tensors is None:
            params = self.program.init_params(0)
        else:
            leaves, _ = to_leaves(
                family, self.model_config, {name: lazy(x) for name, x in tensors.items()}
            )
            params = unflatten({path: np.asarray(x) for path, x in leaves.items()})
        self.bucket = Bucket(
            "video", "video", sizes.rows, sizes.frames, 1, sizes.answer + 1, sizes.answer
        )
        self.state = self.program.init_state(params)
        self.key = self.program.base_key(0)

    def step(self, batch: Any) -> float:
        self.state, metrics = self.compiled(self.state, batch, self.key)
        return float(metrics["loss"].mean())

    def compile(self, batch: Any) -> dict[str, float]:
        """Seconds, as of `timed_compile`."""
        programs, seconds = timed_compile(
            lambda: [self.program.lower_gradient(batch), self.program.lower_update()]
        )
        self.compiled = TrainStep(*programs)
        return seconds


def make_batches(ours: Ours, sizes: Sizes, seed: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    """Our batch, and {ids int64[B, T], pixels float32[B, F, 3, S, S]} of the same rows."""
    rng = np.random.default_rng(seed)
    spec = batch_spec(ours.bucket, ours.model_config)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
    B, (_, P), A = sizes.rows, batch["prefix_tokens"].shape, sizes.answer
    V = ours.model_config.num_visual_tokens(sizes.frames)
    offset = ours.model_config.visual_offset
    batch["frames"][:] = rng.integers(0, 256, batch["frames"].shape)
    batch["frame_valid"][:] = True
    tokens = rng.integers(1, 1000, (B, P + A + 1), np.int32)
    batch["prefix_tokens"][:], batch["branch_tokens"][:, 0] = tokens[:, :P], tokens[:, P:]
    positions = np.arange(P + A + 1)
    batch["prefix_positions"][:], batch["branch_positions"][:] = positions[:P], positions[P:]
    batch["prefix_segments"][:] = batch["branch_segments"][:] = 1
    batch["answer_positions"][:] = np.arange(A)
    batch["answer_tokens"][:, 0] = tokens[:, P + 1 :]
    batch["answer_weights"][:] = 1
    ids = tokens.astype(np.int64)
    ids[:, offset : offset + V] = VIDEO_ID
    pixels = np.asarray(normalise_pixels(ours.model_config.vision, batch["frames"]))
    return batch, {"ids": ids, "pixels": np.moveaxis(pixels, -1, 2).copy()}


def timed_compile(lower: Callable[[], list[Any]]) -> tuple[list[Any], dict[str, float]]:
    """Programs of what `lower` traces and lowers; seconds {"lower", "compile"}."""
    begin = time.perf_counter()
    lowered = lower()
    between = time.perf_counter()
    programs = [each.compile() for each in lowered]
    return programs, {"lower": between - begin, "compile": time.perf_counter() - between}


def agree(steps: dict[str, Callable[[], float]]) -> dict[str, dict[str, Any]]:
    """Losses of three steps of all, from the same weights, and the wall seconds of the first;
    raises where losses differ."""
    losses, first = {}, {}
    for name, step in steps.items():
        begin = time.perf_counter()
        losses[name] = [step()]
        first[name] = time.perf_counter() - begin
        losses[name] += [step(), step()]
    if not all(np.allclose(losses["ours"], found, rtol=TOLERANCE) for found in losses.values()):
        raise AssertionError(f"losses differ: {losses}")
    return {"losses": losses, "seconds, first step": first}


def step_times(sizes: Sizes, rounds: int, threads: int) -> dict[str, Any]:
    settings = usable_settings()
    sides = {name: Torch(sizes, threads, name) for name in settings}
    state = {
        name: x.detach().numpy().copy() for name, x in sides["eager"].model.state_dict().items()
    }
    ours = Ours(sizes, state)
    batch, arrays = make_batches(ours, sizes)
    tensors = {name: sides["eager"].torch.from_numpy(x) for name, x in arrays.items()}
    rows: dict[str, Any] = {"seconds, compile": ours.compile(batch)}
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: ours.step(batch)}
    runs |= {name: functools.partial(side.step, tensors) for name, side in sides.items()}
    return rows | agree(runs) | compared(measure(runs, rounds))


def compared(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Rows of a ratio to the setting that is fastest in a kind of time, which they name.

    Args:
      found: wall and CPU seconds of every round of "ours" and of the settings.
    """
    rows: dict[str, Any] = {}
    for kind, index in (("wall", 0), ("cpu", 1)):
        seconds = {
            name: statistics.median(t[index] for t in times) for name, times in found.items()
        }
        best = min(seconds.keys() - {"ours"}, key=seconds.__getitem__)
        ratios = [t[index] / o[index]
                  for o, t in zip(found["ours"], found[best], strict=True)]  # fmt: skip
        rows[f"torch / ours, {kind}"] = {
            "baseline": best, "median": statistics.median(ratios),
            "quartiles": [float(x) for x in np.quantile(ratios, [0.25, 0.75])],
        }  # fmt: skip
        rows[f"seconds, {kind}"] = seconds
    return rows


def memory_of(side: str, sizes: Sizes, threads: int, inputs: pathlib.Path) -> float:
    """MiB that this process needs in a step beyond what it holds between steps: gradients, what
    the backward pass reads, and everything temporary. `side` is "ours", which leaves the
    rows in `inputs`, or one of SETTINGS."""
    if side != "ours":
        theirs = Torch(sizes, threads, side)
        with np.load(inputs) as arrays:
            tensors = {name: theirs.torch.from_numpy(x) for name, x in arrays.items()}

        def step() -> float:
            return theirs.step(tensors)
    else:
        ours = Ours(sizes)
        batch, arrays = make_batches(ours, sizes)
        np.savez(inputs, **arrays)
        ours.compile(batch)

        def step() -> float:
            return ours.step(batch)

    for _ in range(2):  # the first makes the state of PyTorch's optimizer
        step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kib("VmRSS")
    for _ in range(3):
        step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def dispatch_milliseconds(program: Program, state: Any, batch: Any, calls: int = 200) -> dict:
    """Median and 90th percentile of call to return; nothing waits for a result."""
    key = program.base_key(0)
    nothing = jax.jit(lambda state, batch, key: state, donate_argnums=0, keep_unused=True)
    state = nothing(state, batch, key)
    times = []
    for _ in range(calls):
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = nothing(state, batch, key)
        times.append(1e3 * (time.perf_counter() - begin))
    return {
        "median": statistics.median(times), "90 %": float(np.quantile(times, 0.9)),
        "leaves": len(jax.tree.leaves((state, batch, key))), "target": 1.0,
        "met": statistics.median(times) < 1.0,
    }  # fmt: skip


def compile_seconds(name: str, arg: str) -> dict[str, float]:
    """Seconds, as of `timed_compile`, of a config's tiny variant: the update and all buckets."""
    config = cell_config(Cell(name, arg, topology=""), tiny=True)
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
    found = read_buckets(training_config.to_dict(config)["buckets"], codec)
    buckets = {bucket.name: bucket for bucket in found}
    contrast = needs_contrast(config)

    def lower() -> list[Any]:
        lowered = [program.lower_update()]
        for bucket in scheduled(tuple(buckets.values())):
            batch = batch_spec(bucket, model_config, contrast=contrast)
            if bucket.beside:
                beside = batch_spec(buckets[bucket.beside], model_config, contrast=contrast)
                batch["beside"] = beside
            lowered.append(program.lower_gradient(batch))
        return lowered

    return timed_compile(lower)[1]


def compile_table(found: dict[str, Any]) -> str:
    """Compile times of the parts that were measured, as a table of Markdown; "" without any."""
    rows: dict[str, dict[str, float]] = {}
    if "step" in found:
        step = found["step"]["result"]
        rows |= {name: {"first": s} for name, s in step["seconds, first step"].items()}
        rows["ours"] |= step["seconds, compile"]
    if "compile" in found:
        for name, seconds in found["compile"]["result"].items():
            rows[f"configs/{name}.py:{','.join(filter(None, (CONFIGS[name], 'tiny')))}"] = seconds
    lines = ["| | trace and lower, s | compile, s | first step, s |", "|---|---|---|---|"]
    for name, seconds in rows.items():
        cells = [f"{seconds[k]:.2f}" if k in seconds else "" for k in ("lower", "compile", "first")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) if rows else ""


def memory_of_all(sizes: Sizes, threads: int) -> dict[str, Any]:
    """`memory_of` each side in a process of its own, which gives back what it frees."""
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in ("ours", *usable_settings()):
            out = pathlib.Path(folder) / "found.json"
            options = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(sizes)}
            options |= {"side": side, "out": out, "threads": threads}
            command = [sys.executable, "-m", "experiments.benchmarks.train_step"]
            command += [f"--{name}={value}" for name, value in options.items()]
            subprocess.run(command, check=True, env=environment)
            sides[side] = json.loads(out.read_text())["MiB"]
    best = min(sides.keys() - {"ours"}, key=sides.__getitem__)
    return sides | {"baseline": best, "ours / torch": sides["ours"] / sides[best]}


def dispatch(sizes: Sizes) -> dict[str, Any]:
    ours = Ours(sizes)
    batch, _ = make_batches(ours, sizes)
    return dispatch_milliseconds(ours.program, ours.state, jax.device_put(batch))


def run(sizes: Sizes, rounds: int, threads: int, parts: Sequence[str]) -> dict[str, Any]:
    """Some parts of the benchmark; see the module."""
    measured: dict[str, Callable[[], Any]] = {
        "step": lambda: step_times(sizes, rounds, threads),
        "memory": lambda: memory_of_all(sizes, threads),
        "dispatch": lambda: dispatch(sizes),
        "compile": lambda: {name: compile_seconds(name, p) for name, p in CONFIGS.items()},
    }
    about = {
        "sizes": dataclasses.asdict(sizes), "threads": threads, "process": process_settings(),
        "versions": versions(),
    }  # fmt: skip
    return {
        part: {"result": measured[part](), "load_average": os.getloadavg()[0], **about}
        for part in parts
    }


def main() -> None:
    parser = command_line.make_parser("train_step", __doc__)
    command_line.add_sizes(parser, Sizes)
    command_line.add_rounds(parser, 12)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="measured again, the others stay in the file "
        "(default: %(default)s)")
    add("--side", choices=("ours", *SETTINGS), help="only the memory of this side; PyTorch reads "
        "the inputs.npz that ours left beside --out")
    flags = parser.parse_args()
    require_cpu()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    sizes = command_line.read_sizes(flags, Sizes)
    if flags.side:
        inputs = flags.out.with_name("inputs.npz")
        result = {"MiB": memory_of(flags.side, sizes, flags.threads, inputs)}
    else:
        old = json.loads(flags.out.read_text()) if flags.out.exists() else {}
        with tempfile.TemporaryDirectory() as cache:  # empty; the processes of `memory` share it
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            found = run(sizes, flags.rounds, flags.threads, flags.parts.split(","))
        result = old | found
    print(command_line.write_record(flags.out, result))
    if not flags.side:
        print(compile_table(found))


if __name__ == "__main__":
    main()
