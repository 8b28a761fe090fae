"""Tokens a second of our sampler against `transformers` generate: many questions about one video.

    python -m experiments.benchmarks.sampler --out experiments/results/benchmarks/sampler.json

One LLaVA-OneVision of small width with random weights: transformers writes the checkpoint, we
import it. Both are greedy, in float32, with a key/value cache, and first have to give the same
tokens:

  ours          the video is encoded and its prefix run once; the questions are branches of it
  generate      a batch of one row a question, each with the video: what `generate` does by itself
  reused_cache  the prefix run once, its cache repeated for every question ("re-use cache" in the
                documentation of transformers), then `generate` on the batch

The two of transformers run in torch.inference_mode with scaled-dot-product attention, on as many
threads as XLA has processors, each in the fastest of SETTINGS; the record names it, and of a
setting that does not run here the reason. Questions have one length: no row is padded.

Rounds run each of them twice, of which the second is timed, one after the other in turning order;
ratios are taken within a round, and the median of rounds is reported. Beside it stands the ratio of
FLOPs in matrix products, attention counted dense. CPU time is of the process.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait burn no CPU time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.benchmarks import command_line
from experiments.benchmarks.dpo_step import fastest, measure, versions
from experiments.benchmarks.torch_settings import process_settings, require_cpu
from tpo_jax.generation.sampler import Sampler, Sampling
from tpo_jax.interop.families.registry import family_of, to_leaves
from tpo_jax.interop.folder import load_codec
from tpo_jax.models.towers.registry import normalise_pixels
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import unflatten
from tpo_jax.training.flops import matmul_flops

IMAGE_ID, VIDEO_ID = 1022, 1023  # beyond the tokens of the shipped tokenizer, never drawn
VOCABULARY, TARGET = 1024, 3.0
# What `generate` of transformers keeps keys and values in, and whether torch.compile makes its step
# of decoding, as it does by itself with a static cache on an accelerator.
SETTINGS: dict[str, dict[str, bool]] = {
    "dynamic cache": {"static": False, "compiled": False},
    "static cache": {"static": True, "compiled": False},
    "static cache, torch.compile": {"static": True, "compiled": True},
}
PROGRAMS = ("generate", "reused_cache")
CODEC = importlib.resources.files("tpo_jax") / "assets" / "tiny_base"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """frames of size x size pixels in patches of `patch`; four patches are a token.

    questions: about the video. question, answer: tokens of one.
    """

    frames: int = 32
    size: int = 64
    patch: int = 8
    questions: int = 10
    question: int = 24
    answer: int = 32

    @property
    def visual(self) -> int:
        """Tokens of the video, the newline at its end with them."""
        side = (self.size // self.patch + 1) // 2
        return self.frames * side**2 + 1


def checkpoint(sizes: Sizes, width: int, depth: int, folder: pathlib.Path) -> Any:
    """A random LlavaOnevisionForConditionalGeneration, saved to `folder`."""
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    text = {
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": width,
        "intermediate_size": 3 * width, "num_hidden_layers": depth,
        "num_attention_heads": width // 32, "num_key_value_heads": width // 64,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": depth, "num_attention_heads": width // 32, "image_size": sizes.size,
        "patch_size": sizes.patch, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID,
        video_token_index=VIDEO_ID, vision_feature_select_strategy="full", vision_feature_layer=-1,
        image_grid_pinpoints=[[sizes.size, sizes.size]], attn_implementation="sdpa",
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # larger than a fresh model's, so that the best token stands out
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model


class Ours:
    """The sampler on the imported checkpoint, and the inputs of both sides."""

    def __init__(self, folder: pathlib.Path, sizes: Sizes):
        data = json.loads((folder / "config.json").read_text())
        family = family_of(data)
        config = family.model_config(data, {})
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        leaves, _ = to_leaves(family, config, tensors)
        vision = dataclasses.replace(config.vision, max_frames=sizes.frames)
        self.config = dataclasses.replace(config, vision=vision)
        self.params = unflatten(jax.tree.map(jnp.asarray, leaves))
        self.model, self.sizes = FunctionalModel(self.config), sizes
        self.sampler = Sampler(self.model, load_codec(str(CODEC)), Sampling(max_new=sizes.answer))
        self.batch = self._batch()
        self.keys = jax.random.split(jax.random.key(0), (1, sizes.questions))  # greedy: not read

    def _batch(self) -> dict[str, np.ndarray]:
        """One row: the video between two and one tokens, and a branch for each question."""
        rng, sizes = np.random.default_rng(0), self.sizes
        before, K, R = self.config.visual_offset, sizes.questions, sizes.question
        P, F = before + sizes.visual + 1, sizes.frames
        text = np.flatnonzero(self.free)
        return {
            "frames": rng.integers(0, 256, (1, F, sizes.size, sizes.size, 3), np.uint8),
            "frame_valid": np.ones((1, F), bool), "frame_times": np.zeros((1, F), np.float32),
            "prefix_tokens": rng.choice(text, (1, P)).astype(np.int32),
            "prefix_positions": np.arange(P, dtype=np.int32)[None],
            "prefix_segments": np.ones((1, P), np.int32),
            "branch_tokens": rng.choice(text, (1, K, R)).astype(np.int32),
            "branch_positions": np.broadcast_to(P + np.arange(R, dtype=np.int32), (1, K, R)),
            "branch_segments": np.ones((1, K, R), np.int32), "slots": {},
        }  # fmt: skip

    @property
    def free(self) -> np.ndarray:
        """bool[V], tokens that may be drawn."""
        codec = self.sampler.codec
        free = np.arange(VOCABULARY) < codec.vocab_size
        free[list(codec.special_ids.values())] = False
        free[codec.eos_id] = True
        return free

    def __call__(self) -> Any:
        context = self.sampler.prefill(self.params, self.batch)
        return jax.block_until_ready(
            self.sampler.generate(self.params, context, self.batch, self.keys)
        )

    def flops(self) -> dict[str, float]:
        """FLOPs in matrix products of one run of each program.

        A decoding step is the same for all of them, up to the logits of the first token.
        """
        sizes, batch = self.sizes, self.batch
        K, R, N = sizes.questions, sizes.question, sizes.answer
        P = batch["prefix_tokens"].shape[1]

        def encode(params, batch):
            clip = (batch[name] for name in ("frames", "frame_valid", "frame_times"))
            return self.model.bind(params).encode(*clip)

        def rows(params, embeds):
            positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
            language = self.model.bind(params).language
            return language.prefill(embeds, positions, jnp.ones(embeds.shape[:2], jnp.int32))

        def extend(params, tokens, room):
            language, (_, T) = self.model.bind(params).language, tokens.shape
            cache = jax.eval_shape(lambda: language.empty_cache(1, K, room, jnp.float32))
            ones = jnp.ones((1, K, T), jnp.int32)
            _, prefix = rows(params, jnp.zeros((1, P, self.config.language.width)))
            own = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
            embeds = language.embed_tokens(tokens)[None]
            return language.extend(
                embeds, ones, ones, prefix, jnp.ones((1, P), jnp.int32), own, jnp.int32(0)
            )

        def width(*shape):
            return jax.ShapeDtypeStruct((*shape, self.config.language.width), jnp.float32)

        def ids(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        video = matmul_flops(encode, self.params, batch)
        prefix = matmul_flops(rows, self.params, width(1, P))
        repeated = matmul_flops(rows, self.params, width(K, P + R))

        def branches(tokens):
            run = lambda params, tokens: extend(params, tokens, R + N)  # noqa: E731
            return matmul_flops(run, self.params, ids(K, tokens)) - prefix

        logits = 2.0 * K * self.config.language.width * VOCABULARY
        decoding = N * (branches(1) + logits)
        shared = video + prefix + branches(R) + decoding
        return {
            "ours": shared, "reused_cache": shared,
            "generate": K * video + repeated + decoding,
        }  # fmt: skip


class Theirs:
    """`generate` on the same inputs, in one of SETTINGS."""

    def __init__(self, model: Any, ours: Ours, threads: int, setting: str):
        import torch
        from transformers import CompileConfig

        torch.set_num_threads(threads)
        self.torch, self.model, batch = torch, model, ours.batch
        self.static, self.compiled = SETTINGS[setting]["static"], SETTINGS[setting]["compiled"]
        self.questions = K = ours.sizes.questions
        prefix = batch["prefix_tokens"][0].astype(np.int64)
        before = ours.config.visual_offset
        prefix[before : before + ours.sizes.visual] = VIDEO_ID
        ids = np.concatenate([np.tile(prefix, (K, 1)), batch["branch_tokens"][0]], axis=1)
        pixels = np.asarray(normalise_pixels(ours.config.vision, jnp.asarray(batch["frames"])))
        self.pixels = torch.from_numpy(np.moveaxis(pixels, -1, -3).copy())
        self.repeated = self.pixels.repeat(K, 1, 1, 1, 1)
        self.prefix, self.ids = torch.from_numpy(prefix)[None], torch.from_numpy(ids)
        codec = ours.sampler.codec
        self.options = {
            "max_new_tokens": ours.sizes.answer, "do_sample": False,
            "eos_token_id": codec.eos_id, "pad_token_id": codec.pad_id,
            "suppress_tokens": np.flatnonzero(~ours.free).tolist(),
            "disable_compile": not self.compiled,
        }  # fmt: skip
        if self.compiled:
            self.options["compile_config"] = config = CompileConfig()
            config._compile_all_devices = True  # no public option asks for it on a CPU

    def _answers(self, **inputs: Any) -> np.ndarray:
        attention_mask = self.torch.ones_like(self.ids)
        out = self.model.generate(
            input_ids=self.ids, attention_mask=attention_mask, **inputs, **self.options
        )
        if self.compiled and not compiled_frames():
            raise RuntimeError("transformers compiled nothing; it warns of the reason")
        return out[:, self.ids.shape[1] :].numpy()

    def generate(self) -> np.ndarray:
        """int[K, N]"""
        cache = {"cache_implementation": "static"} if self.static else {}
        with self.torch.inference_mode():
            return self._answers(pixel_values_videos=self.repeated, **cache)

    def reused_cache(self) -> np.ndarray:
        """int[K, N]"""
        from transformers import DynamicCache

        with self.torch.inference_mode():
            cache = DynamicCache(config=self.model.config.get_text_config())
            self.model(
                input_ids=self.prefix, pixel_values_videos=self.pixels, cache=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            if self.static:
                cache = self._with_room(cache)
            else:
                cache.batch_repeat_interleave(self.questions)
            return self._answers(cache=cache)

    def _with_room(self, prefix: Any) -> Any:
        """A static cache of the prefix for every question, as long as `generate` makes it: the last
        token of an answer is not read. For another length torch.compile makes another program."""
        from transformers import StaticCache

        length = self.ids.shape[1] + self.options["max_new_tokens"] - 1
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=length)
        for index, layer in enumerate(prefix.layers):
            kept = (x.repeat_interleave(self.questions, 0) for x in (layer.keys, layer.values))
            cache.update(*kept, index)
        return cache


def compiled_frames() -> int:
    """Python frames of which torch.compile has made a program in this process."""
    from torch._dynamo.utils import counters

    return counters["frames"]["ok"]


def usable(
    sides: Mapping[str, Any], program: str, tokens: np.ndarray
) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, str]]:
    """Runs a program in every setting: those in which it runs, and why it does not in others.

    Args:
      sides: `Theirs` by setting; the first has to run.
      program: of PROGRAMS.
      tokens: int[K, N], what all have to answer.
    """
    runs, refused = {}, {}
    for setting, side in sides.items():
        run = getattr(side, program)
        try:
            found = run()
        except Exception as error:  # torch.compile and its compiler have no error in common
            if not runs:
                raise
            refused[setting] = f"{type(error).__name__}: {error}"
            continue
        if not np.array_equal(found, tokens[:, : found.shape[1]]):
            raise AssertionError(f"{program}, {setting}, answers {found}, ours {tokens}")
        runs[setting] = run
    return runs, refused


def ratio_row(name: str, times: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Ours against a program: medians and quartiles of ratios within a round.

    Args:
      times: (wall, CPU) seconds of each round, of "ours" and the program.
    """
    row: dict[str, Any] = {"ratio": f"ours / {name}", "target": TARGET}
    for kind, index in (("wall", 0), ("cpu", 1)):
        each = [
            theirs[index] / ours[index]
            for theirs, ours in zip(times[name], times["ours"], strict=True)
        ]
        row[kind] = statistics.median(each)
        row[f"{kind}_quartiles"] = [float(x) for x in np.quantile(each, [0.25, 0.75])]
    return row | {"met": row["wall"] >= TARGET}


def run(sizes: Sizes, width: int, depth: int, rounds: int, threads: int,
        settings: Sequence[str] = tuple(SETTINGS)) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark; see the module.

    Args:
      settings: of SETTINGS, of which the first has to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(sizes, width, depth, pathlib.Path(folder))
        ours = Ours(pathlib.Path(folder), sizes)
    sides = {name: Theirs(model, ours, threads, name) for name in settings}
    answers = jax.device_get(ours())
    tokens, lengths = answers.tokens[0], answers.lengths[0]
    programs, baselines = {}, {}
    for name in PROGRAMS:
        runs, refused = usable(sides, name, tokens)
        setting, seconds = fastest(runs)
        programs[name] = runs[setting]
        baselines[name] = {"setting": setting, "settings": seconds, "refused": refused}
    frames = compiled_frames()
    times = measure({"ours": ours, **programs}, rounds)
    flops, count = ours.flops(), int(lengths.sum())
    rows = [
        ratio_row(name, times) | {"flops": flops[name] / flops["ours"]} | baselines[name]
        for name in programs
    ]
    return {
        "tokens_per_second": rows, "answer_tokens": count,
        "ours_tokens_per_second": {
            kind: count / statistics.median(t[index] for t in times["ours"])
            for kind, index in (("wall", 0), ("cpu", 1))
        },
        "setting": "transformers generate, batched, sdpa, inference_mode, float32",
        "compiled_frames": {"before": frames, "while_measured": compiled_frames() - frames},
        "distinct_tokens": len(np.unique(tokens)), "sizes": dataclasses.asdict(sizes),
        "prefix": ours.batch["prefix_tokens"].shape[1], "width": width, "depth": depth,
        "flops": flops, "rounds": rounds, "threads": threads,
        "load_average": os.getloadavg()[0], "process": process_settings(), "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = command_line.make_parser("sampler", __doc__)
    command_line.add_sizes(parser, Sizes)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4, help="of either tower")
    command_line.add_rounds(parser, 8)
    flags = parser.parse_args()
    require_cpu()
    sizes = command_line.read_sizes(flags, Sizes)
    result = run(sizes, flags.width, flags.depth, flags.rounds, flags.threads)
    command_line.write_record(flags.out, result)
    for row in result["tokens_per_second"]:
        print(f"{row['ratio']:22s} wall {row['wall']:.2f}  cpu {row['cpu']:.2f}  "
              f"products {row['flops']:.2f}  target {row['target']}  {row['setting']}")  # fmt: skip
        for setting, reason in row["refused"].items():
            print(f"  {setting}: {reason}")


if __name__ == "__main__":
    main()
