"""What a conversion of a large checkpoint holds in memory: at most its largest tensor + 2 GiB.

    python -m experiments.benchmarks.streaming --work runs/streaming --gib 8 \\
        --out experiments/results/benchmarks/streaming.json

Random bfloat16 checkpoints in a published layout are generated in --work, one after the other:

  qwen2       a language folder, Qwen2-7B's widths, as many layers as --gib holds
  llava_qwen  LLaVA-Video's layout, SigLIP-so400m and the same decoder

`convert import` and `convert export` of each are processes of their own, whose peak resident set is
what the kernel counted (wait4, as `/usr/bin/time -v` reads it). Every exported tensor is compared
with the source bit for bit. --work needs three times --gib of disk; it is emptied again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GIB = 2**30
ROOM = 2 * GIB  # beyond the largest tensor
LAYOUTS = ("qwen2", "llava_qwen")
QWEN2_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip
LLAVA = {
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2, "mm_newline_position": "grid",
    "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(6x6)",
    "frames_upbound": 64, "force_sample": True, "add_time_instruction": True,
    "conv_template": "qwen_1_5",
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def published_config(layout: str, text: Mapping[str, Any], layers: int, **more: Any) -> dict:
    """config.json of a layout; `more` replaces what it says beside the language model."""
    sizes = {**text, "num_hidden_layers": layers}
    if layout == "qwen2":
        return {"model_type": "qwen2", **sizes}
    return {"model_type": "llava_qwen", **sizes, **LLAVA, **more}


def generate(
    folder: pathlib.Path, layout: str, size: int, text: Mapping[str, Any], **more: Any
) -> dict[str, int]:
    """Writes a published folder of random weights of at most `size` bytes (one layer at least).

    Returns: bytes of all tensors, of the largest, their number and layers of the decoder.
    """
    from tpo_jax.interop.huggingface import write_tensors

    one, two = (tensors_of(published_config(layout, text, n, **more)) for n in (1, 2))
    first, second = (sum(t.nbytes for t in tensors.values()) for tensors in (one, two))
    layers = 1 + max(0, (size - first) // (second - first))
    config = published_config(layout, text, layers, **more)
    tensors = tensors_of(config)
    folder.mkdir(parents=True)
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return {
        "bytes": sum(t.nbytes for t in tensors.values()),
        "largest": max(t.nbytes for t in tensors.values()),
        "tensors": len(tensors), "layers": layers,
    }  # fmt: skip


def tensors_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Random tensors by their published names, of which nothing is made before it is read."""
    import numpy as np
    from flax import nnx

    from tpo_jax.interop import huggingface
    from tpo_jax.interop.families.registry import family_of
    from tpo_jax.interop.mapping import export_leaves
    from tpo_jax.interop.tensors import LazyArray
    from tpo_jax.models.language import LanguageModel
    from tpo_jax.models.layers import Rngs
    from tpo_jax.models.video_language import FunctionalModel
    from tpo_jax.parallel.paths import flatten

    family = family_of(config)
    if family is None:
        language = huggingface.language_config(config)
        rows = huggingface.language_rows(language, config["vocab_size"])
        state = nnx.state(nnx.eval_shape(lambda: LanguageModel(language, rngs=Rngs(0))))
        abstract = {"language": nnx.to_pure_dict(state)}
    else:
        model = family.model_config(config, {})
        rows, abstract = family.rows(model, ()), FunctionalModel(model).abstract()
    # Export looks at nothing of a leaf but rows that are zero because no token uses them.
    leaves = {
        path: LazyArray(leaf.shape, np.dtype(np.float32), lambda index: np.zeros(
            [part.stop - part.start for part in index], np.float32))
        for path, leaf in flatten(abstract).items()
    }  # fmt: skip
    return {name: random_array(name, t.shape) for name, t in export_leaves(rows, leaves).items()}


@functools.cache
def _random_bits() -> Any:
    """uint16 of an odd length, so that rows of a matrix differ."""
    import numpy as np

    rng, period = np.random.default_rng(0), 2**20 - 3
    sign = rng.integers(0, 2, period, np.uint16) << 15
    return sign | rng.integers(0x3C00, 0x3F80, period, np.uint16)


def random_array(name: str, shape: Sequence[int]) -> Any:
    """bfloat16 of +-[2^-7, 1), one block of 2 MiB repeated from a place that the name decides; it
    is read in whole rows."""
    import ml_dtypes
    import numpy as np

    from tpo_jax.interop.tensors import BLOCK_BYTES, LazyArray

    bits = _random_bits()
    period = len(bits)
    width, start = math.prod(shape[1:]), zlib.crc32(name.encode())

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows = index[0]
        block = np.roll(bits, -(start + rows.start * width) % period)
        values = np.resize(block, (rows.stop - rows.start, *shape[1:]))
        return values.view(ml_dtypes.bfloat16)

    unit = max(1, BLOCK_BYTES // (2 * width))
    return LazyArray(tuple(shape), np.dtype(ml_dtypes.bfloat16), read, unit)


def write_tokenizer(folder: pathlib.Path) -> None:
    from tpo_jax.data.text import train_tokenizer

    tokenizer = train_tokenizer(["You are a helpful assistant. What happens?"], 300)
    tokenizer.add_special_tokens(list(SPECIAL))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2],
             "pad_token": SPECIAL[0], "chat_template": CHAT}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def differing(source: pathlib.Path, exported: pathlib.Path) -> list[str]:
    """Names of tensors that one of two published folders lacks or has with other bits."""
    import numpy as np

    from tpo_jax.interop.huggingface import read_tensors

    left, right = read_tensors(source), read_tensors(exported)
    wrong = set(left) ^ set(right)
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        same = (a.shape, a.dtype) == (b.shape, b.dtype) and all(
            np.array_equal(x.view(np.uint8), y.view(np.uint8))
            for x, y in zip(a.blocks(), b.blocks(), strict=True)
        )
        wrong |= set() if same else {name}
    return sorted(wrong)


def measure(command: Sequence[str]) -> dict[str, float]:
    """Runs a command: its peak resident set in bytes, seconds and CPU seconds.

    The kernel counts a process's peak from what its parent held when it started, so this process
    imports nothing large.
    """
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    return {
        "peak": used.ru_maxrss * 1024, "seconds": time.monotonic() - begin,
        "cpu": used.ru_utime + used.ru_stime,
    }  # fmt: skip


def convert(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tpo_jax.convert", *map(str, arguments)]


def run_layout(
    layout: str, work: pathlib.Path, about: Mapping[str, int],
    run: Callable[[Sequence[str]], dict[str, float]] = measure,
) -> dict[str, Any]:
    """Import and export of work/source; `about` is what `generate` returned."""
    source, model, out = (work / name for name in ("source", "model", "exported"))
    like = ["--like", source] if layout == "llava_qwen" else []
    found = {
        "import": run(convert("import", "--source", source, "--out", model)),
        "export": run(convert("export", "--model", model, "--out", out, *like)),
    }
    limit = about["largest"] + ROOM
    return {**about, "limit": limit, **found,
            "met": all(row["peak"] <= limit for row in found.values())}  # fmt: skip


def page(results: Mapping[str, Any], command: str) -> str:
    """The table of a results file."""
    lines = [
        "# What a conversion holds in memory", "", f"    {command}", "",
        "Generated checkpoints in bfloat16 with the widths of the 7B models. The limit is the "
        "largest tensor + 2 GiB;", "every exported tensor had the bits of the source. The machine "
        "had other work beside it.", "",
        "| layout | checkpoint | tensors | largest | command | peak resident set | limit | elapsed "
        "(CPU) |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for layout, row in results.items():
        for name in ("import", "export"):
            part = row[name]
            lines.append(
                f"| {layout}, {row['layers']} layers | {row['bytes'] / GIB:.2f} GiB "
                f"| {row['tensors']} | {row['largest'] / GIB:.2f} GiB | `{name}` "
                f"| {part['peak'] / GIB:.2f} GiB | {row['limit'] / GIB:.2f} GiB, "
                f"{'met' if part['peak'] <= row['limit'] else 'MISSED'} "
                f"| {part['seconds']:.0f} s ({part['cpu']:.0f} s) |"
            )
    return "\n".join(lines) + "\n"


def own_part(part: str, work: pathlib.Path, layout: str, gib: float) -> None:
    """Generating and comparing, in a process of their own: see `measure`."""
    if part == "generate":
        about = generate(work / "source", layout, int(gib * GIB), QWEN2_7B)
        (work / "about.json").write_text(json.dumps(about))
    elif wrong := differing(work / "source", work / "exported"):
        raise SystemExit(f"{layout}: {len(wrong)} exported tensors differ, such as {wrong[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write, and a page beside it")
    parser.add_argument("--gib", type=float, default=8.0, help="of a checkpoint, at most")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="default: %(default)s")
    parser.add_argument("--part", choices=("generate", "compare"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part:
        return own_part(flags.part, flags.work, flags.layouts, flags.gib)
    if flags.out is None:
        parser.error("--out: missing; name the JSON file to write")
    me = [sys.executable, "-m", "experiments.benchmarks.streaming", f"--gib={flags.gib}"]
    results: dict[str, Any] = {}
    for layout in flags.layouts.split(","):
        work = flags.work / layout
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        part = [*me, f"--work={work}", f"--layouts={layout}"]
        measure([*part, "--part=generate"])
        about = json.loads((work / "about.json").read_text())
        results[layout] = run_layout(layout, work, about)
        measure([*part, "--part=compare"])
        shutil.rmtree(work)
        command = f"python -m experiments.benchmarks.streaming --work DIR --gib {flags.gib:g} \\\n"
        command += f"        --layouts {','.join(results)} --out {flags.out}"
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(results, indent=2) + "\n")
        flags.out.with_suffix(".md").write_text(page(results, command))
    print(flags.out.with_suffix(".md").read_text())
    if not all(row["met"] for row in results.values()):
        raise SystemExit("the limit was missed")


if __name__ == "__main__":
    main()
