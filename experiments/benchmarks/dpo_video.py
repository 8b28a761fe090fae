"""What a preference step on videos costs: ours against PyTorch, both from pixels.

    python -m experiments.benchmarks.dpo_video --out experiments/results/benchmarks/dpo_video.json
    python -m experiments.benchmarks.dpo_video --unroll \\
        --out experiments/results/benchmarks/dpo_video_unrolled.json

A LLaVA-OneVision of small width (SigLIP on every frame, two matrices, bilinear pooling, Qwen2): one
set of weights, the same pairs of two answers about a clip of 32 frames. As published for TPO the
tower is frozen, language model and projector are trained; sigmoid loss, clipping, AdamW, float32.
By default the forward pass of the tower is about as large a part of the language model's as in
LLaVA-OneVision-7B ("vision / language" in the record, by products), heads are as wide as in its
0.5B (64) and an answer is a 35th of the prefix (of 6,272 tokens of 32 frames and a question, 180
would be).

  shared     the program of `python -m tpo_jax.train`: a clip is encoded once, both answers are
             branches of one prefix, the reference is a sidecar's
  score      the program of `python -m tpo_jax.preferences score`, once a pair and epoch
  published  LlavaOnevisionForConditionalGeneration of `transformers`, two rows a pair, each with
             its clip, logits of the answers only; the frozen reference does the same in the step
  once       the same model, the tower once a pair, without a gradient, for both rows of policy and
             reference; the projector once a pair for each of the two
  *_cached   without the reference: its log-probabilities are given
  once_score the reference of `once` alone, what its log-probabilities cost

`published` is what TRL's trainer does with rows that bring pixels, `once` the best that rows of
this model can be given. Both run in their fastest of `torch_settings`; the record names it, and how
both sides allocate memory (`process`; dpo_step.md says which way was fastest). Pixels are given to
PyTorch resized and normalised, to ours as bytes. The record says why TRL's trainer itself is not
timed. Our layers are looped over, as in large models, or with --unroll a copy of the program each
(`unroll` in docs/families.md), as PyTorch runs them.

Before any measurement all have to agree: every log-probability of the reference, the number of
trained parameters, and the losses of three steps. Rounds, times and ratios are those of `dpo_step`:
a ratio is taken within a round, the median of rounds is reported, beside it the ratio of FLOPs in
matrix products, attention counted dense.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait burn no CPU time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import command_line, train_step
from experiments.benchmarks.dpo_step import Ratios, fastest, measure, medians, ratio_rows, versions
from experiments.benchmarks.torch_settings import (
    SETTINGS,
    process_settings,
    require_cpu,
    usable_settings,
)
from experiments.benchmarks.train_step import IMAGE_ID, VIDEO_ID, published_config
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.interop.families.registry import family_of, to_leaves
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.towers.registry import normalise_pixels
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.objectives.logps import token_logps
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import unflatten
from tpo_jax.parallel.rules import place
from tpo_jax.training import config as training_config
from tpo_jax.training.flops import forward_flops, matmul_flops
from tpo_jax.training.objective import answer_scores
from tpo_jax.training.program import make_program
from tpo_jax.training.state import merge, partition
from tpo_jax.training.step import TrainStep

BETA, RATE, CLIP, EPSILON = 0.3, 1e-5, 1.0, 1e-8
TOLERANCE = 2e-3  # nats, of a log-probability; float32 in two programs
LAYOUTS = ("published", "once")
SETTING = "transformers LlavaOnevision, sdpa, no dropout, float32; torch.optim.AdamW; "
TRL = (
    "not timed, it takes no video (trl 1.16, trainer/dpo_trainer.py): rows are visual by a column "
    "image or images alone (line 741), of which the collator gives the processor images= (306 to "
    "323), so that frames become stills with tiles and without pooling, other tokens than a "
    "video's; a column of videos is dropped (1144). A collator of one's own that brings "
    "pixel_values_videos would have it pass them to the model with both rows, to policy and "
    "reference (1290 to 1338), which is `published` here, but with the output matrix at all "
    "positions where there is no Triton (trainer/utils.py, 1642). Reference log-probabilities in "
    "advance it refuses for visual rows (764): `published_cached` is beyond it."
)
# As in dpo_step.RATIOS.
RATIOS: Ratios = {
    "published / shared": (("published",), ("shared",), 2.6, True),
    "published / (shared + score)": (("published",), ("shared", "score"), 2.0, True),
    "once / shared": (("once",), ("shared",), 2.6, True),
    "once / (shared + score)": (("once",), ("shared", "score"), 2.0, True),
    "published_cached / shared": (("published_cached",), ("shared",), None, True),
    "once_cached / shared": (("once_cached",), ("shared",), None, True),
    "(once_cached + once_score) / (shared + score)": (
        ("once_cached", "once_score"), ("shared", "score"), None, True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes(train_step.Sizes):
    """rows: pairs of a step. text: tokens of a question, behind the video."""

    rows: int = 4
    frames: int = 32
    head_dim: int = 64
    vision_width: int = 72
    vision_depth: int = 2
    text: int = 48
    answer: int = 15


class Ours:
    """The programs of `train` and of `preferences score`, from PyTorch's weights."""

    def __init__(self, sizes: Sizes, weights: Mapping[str, np.ndarray], unroll: bool = False):
        data = published_config(sizes)
        family = family_of(data)
        published = family.model_config(data, {})
        self.model_config = dataclasses.replace(
            published,
            vision=dataclasses.replace(published.vision, unroll=unroll),
            language=dataclasses.replace(published.language, unroll=unroll),
        )
        config = training_config.default_config()
        config.objective = "preference"
        config.preference.update(beta=BETA, sft=0.0)
        config.trainable = [["language/|connector/", RATE]]
        config.optimizer.update(
            warmup=0.0, weight_decay=0.0, clip=CLIP, min_lr_ratio=1.0, eps=EPSILON
        )
        self.program = make_program(config, self.model_config, make_mesh({}, jax.devices()[:1]))
        leaves, _ = to_leaves(
            family, self.model_config, {name: lazy(x) for name, x in weights.items()}
        )
        params = unflatten({path: np.asarray(x) for path, x in leaves.items()})
        self.reference = place(params, self.program.param_shardings)
        self.state = self.program.init_state(params)
        self.key = self.program.base_key(0)

    @property
    def trained(self) -> int:
        """Numbers that training changes."""
        moved, _ = partition(self.state.params, self.program.trainable)
        return sum(x.size for x in jax.tree.leaves(moved))

    def compile(self, batch: Any) -> None:
        self.compiled: TrainStep = self.program.compile_train_step(batch)

    def step(self, batch: Any) -> float:
        self.state, metrics = self.compiled(self.state, batch, self.key)
        return float(metrics["loss"].mean())

    def score(self, batch: Any) -> jax.Array:
        """float32[B, 2, A]"""
        return jax.block_until_ready(self.program.score_step(self.reference, batch))


def make_batches(ours: Ours, sizes: Sizes, seed: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    """Our batch, without reference_logps, and of the same pairs ids int64[2B, T] (chosen and
    rejected of a pair one after the other) and pixels float32[B, F, 3, S, S]."""
    rng = np.random.default_rng(seed)
    B, R, A = sizes.rows, sizes.answer + 1, sizes.answer
    bucket = Bucket("pairs", "video", B, sizes.frames, 2, R, A, question=sizes.text)
    spec = batch_spec(bucket, ours.model_config, reference=False)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
    P = batch["prefix_tokens"].shape[1]
    batch["frames"][:] = rng.integers(0, 256, batch["frames"].shape)
    batch["prefix_tokens"][:] = rng.integers(1, 1000, (B, P))
    batch["branch_tokens"][:] = rng.integers(1, 1000, (B, 2, R))
    batch["branch_tokens"][:, 1, 0] = batch["branch_tokens"][:, 0, 0]  # the assistant's marker
    batch["prefix_positions"][:], batch["branch_positions"][:] = np.arange(P), P + np.arange(R)
    batch["answer_positions"][:] = np.arange(A)
    batch["answer_tokens"][:] = batch["branch_tokens"][:, :, 1:]
    ones = ("frame_valid", "prefix_segments", "branch_segments", "answer_weights", "pair_valid")
    for name in ones:
        batch[name][:] = 1
    ids = np.repeat(batch["prefix_tokens"], 2, axis=0)
    offset = ours.model_config.visual_offset
    ids[:, offset : offset + ours.model_config.num_visual_tokens(sizes.frames)] = VIDEO_ID
    ids = np.concatenate([ids, batch["branch_tokens"].reshape(2 * B, R)], axis=1)
    pixels = np.asarray(normalise_pixels(ours.model_config.vision, batch["frames"]))
    return batch, {"ids": ids.astype(np.int64), "pixels": np.moveaxis(pixels, -1, 2).copy()}


def make_model(sizes: Sizes) -> Any:
    """LlavaOnevisionForConditionalGeneration, of random weights."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    data = {k: v for k, v in published_config(sizes).items() if k != "model_type"}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        **data, image_token_index=IMAGE_ID, video_token_index=VIDEO_ID, attn_implementation="sdpa",
    ))  # fmt: skip


def draw_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Of `make_model`, larger than a fresh model's: answers depend on the video, or a wrong one
    would not be found out."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, x in make_model(sizes).state_dict().items():
        drawn[name] = x.numpy().copy()
        if x.ndim > 1 and x.is_floating_point():
            drawn[name][:] = rng.normal(size=x.shape) * x[0].numel() ** -0.5
    return drawn


class Torch:
    """A policy and its frozen reference, in one of LAYOUTS and one of SETTINGS."""

    def __init__(
        self, sizes: Sizes, weights: Mapping[str, np.ndarray], offset: int, layout: str,
        setting: str,
    ):  # fmt: skip
        import torch

        self.torch, self.once = torch, layout == "once"
        policy, reference = (make_model(sizes) for _ in range(2))
        for model in (policy, reference):
            model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
        policy.model.vision_tower.requires_grad_(False)
        reference.requires_grad_(False)
        self.trained = [x for x in policy.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=RATE, betas=(0.9, 0.999), eps=EPSILON, weight_decay=0.0,
            fused=SETTINGS[setting]["fused"],
        )  # fmt: skip
        compiled = torch.compile if SETTINGS[setting]["compiled"] else lambda function: function
        reader = functools.partial(from_tower, offset=offset) if self.once else from_pixels
        self.policy, self.reference = (
            compiled(reader(model, sizes.answer)) for model in (policy, reference)
        )
        self.see = compiled(tower_of(reference))

    def video(self, batch: Mapping[str, Any]) -> Any:
        """What `policy` and `reference` read: a pair's features, or the pixels of each row."""
        if not self.once:
            return batch["row_pixels"]
        with self.torch.no_grad():
            return self.see(batch["pixels"])

    def score(self, batch: Mapping[str, Any], video: Any = None) -> Any:
        """float[B, 2, A]; `video` where it is there already."""
        with self.torch.no_grad():
            return self.reference(batch["ids"], self.video(batch) if video is None else video)

    def step(self, batch: Mapping[str, Any], cached: bool) -> float:
        torch, video = self.torch, self.video(batch)
        reference = batch["reference"] if cached else self.score(batch, video)
        ratio = (self.policy(batch["ids"], video) - reference).sum(-1)
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def tower_of(model: Any) -> Callable[[Any], Any]:
    """Function of pixels [B, F, 3, S, S] -> [B * F, patches, width]."""

    def see(pixels: Any) -> Any:
        out = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True)
        return out.hidden_states[model.config.vision_feature_layer]

    return see


def from_pixels(model: Any, answer: int) -> Callable[[Any, Any], Any]:
    """Function of ids [2B, T] and pixels [2B, F, 3, S, S] -> log-probabilities [B, 2, A]."""

    def logps(ids: Any, pixels: Any) -> Any:
        out = model(
            input_ids=ids, pixel_values_videos=pixels, logits_to_keep=answer + 1, use_cache=False
        )
        return of_answers(out.logits, ids)

    return logps


def from_tower(model: Any, answer: int, offset: int) -> Callable[[Any, Any], Any]:
    """Function of ids [2B, T] and features [B * F, patches, width] -> the same. offset: where the
    video begins in a row."""
    import torch

    inner, embed = model.model, model.get_input_embeddings()

    def logps(ids: Any, features: Any) -> Any:
        pairs = len(ids) // 2
        frames = inner.apply_pooling(inner.multi_modal_projector(features))
        tokens = frames.reshape(pairs, -1, frames.shape[-1])
        end = inner.image_newline.expand(pairs, 1, -1)
        video = torch.cat([tokens, end], dim=1).repeat_interleave(2, 0)
        before, after = embed(ids[:, :offset]), embed(ids[:, offset + video.shape[1] :])
        rows = torch.cat([before, video, after], dim=1)
        out = model(inputs_embeds=rows, logits_to_keep=answer + 1, use_cache=False)
        return of_answers(out.logits, ids)

    return logps


def of_answers(logits: Any, ids: Any) -> Any:
    """Logits [2B, A + 1, V] -> log-probabilities [B, 2, A] of the last A of ids [2B, T]."""
    scores = logits[:, :-1].log_softmax(-1)
    targets = ids[:, 1 - logits.shape[1] :, None]
    return scores.gather(-1, targets)[..., 0].unflatten(0, (-1, 2))


def row_logps(model: Any, batch: Any, once: bool) -> jax.Array:
    """float32[B, 2, A] as PyTorch makes them, for their products: two rows a pair."""
    B, K, R = batch["branch_tokens"].shape
    clip = tuple(batch[name] for name in ("frames", "frame_valid", "frame_times"))
    if once:
        visual = jnp.repeat(model.encode(*clip).visual, K, axis=0)
    else:
        visual = model.encode(*(jnp.repeat(x, K, axis=0) for x in clip)).visual
    tokens = jnp.repeat(batch["prefix_tokens"], K, axis=0)
    tokens = jnp.concatenate([tokens, batch["branch_tokens"].reshape(B * K, R)], axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rows = model.embed_prefix(tokens, visual)
    hidden, _ = model.language.prefill(rows, positions, jnp.ones_like(positions))
    hidden = hidden[:, -R:-1].reshape(B, K, R - 1, -1)
    return token_logps(hidden, model.language.table, batch["answer_tokens"])


def products(ours: Ours, batch: Any) -> dict[str, float]:
    """{name: FLOPs of the matrix products}, attention counted dense; and of a tower's pass."""
    config = ours.model_config
    language = dataclasses.replace(config.language, attention="dense")
    model = FunctionalModel(dataclasses.replace(config, language=language))
    params = model.abstract()
    parts = partition(params, ours.program.trainable)

    def both(logps: Callable[[Any, Any], jax.Array]) -> tuple[float, float]:
        """Of the step, without the reference, and of the forward pass."""

        def total(trained: Any, frozen: Any, batch: Any) -> jax.Array:
            return logps(model.bind(merge(trained, frozen)), batch).sum()

        forward = matmul_flops(lambda p, b: logps(model.bind(p), b), params, batch)
        return matmul_flops(jax.grad(total), *parts, batch), forward

    def see(params: Any, batch: Any) -> Any:
        pixels = normalise_pixels(config.vision, batch["frames"])
        return model.bind(params).vision(pixels, batch["frame_valid"])

    found = {"tower": matmul_flops(see, params, batch)}
    found["shared"], found["score"] = both(lambda m, b: answer_scores(m, m(b), b).logp)
    found["published_cached"], passed = both(functools.partial(row_logps, once=False))
    found["published"] = found["published_cached"] + passed
    found["once_cached"], found["once_score"] = both(functools.partial(row_logps, once=True))
    found["once"] = found["once_cached"] + found["once_score"] - found["tower"]
    return found


def check(ours: Ours, sides: Mapping[str, Torch], batch: Any, tensors: Any) -> dict[str, float]:
    """{side: largest difference of its log-probabilities to ours, nats}.

    Raises:
      AssertionError: one is too large, or other parameters are trained.
    """
    wanted, found = np.asarray(ours.score(batch)), {}
    for name, side in sides.items():
        trained = sum(x.numel() for x in side.trained)
        if trained != ours.trained:
            raise AssertionError(f"{name} trains {trained} numbers, ours {ours.trained}")
        found[name] = float(np.abs(side.score(tensors).numpy() - wanted).max())
        if found[name] > TOLERANCE:
            raise AssertionError(f"{name} differs by {found[name]} nats, at most {TOLERANCE}")
    return found


def run(
    sizes: Sizes, rounds: int, threads: int, settings: Sequence[str], unroll: bool
) -> dict[str, Any]:
    """The whole benchmark; see the module. settings: of SETTINGS; their fastest is the baseline."""
    import torch

    torch.set_num_threads(threads)
    weights = draw_weights(sizes)
    ours = Ours(sizes, weights, unroll)
    batch, arrays = make_batches(ours, sizes)
    batch["reference_logps"] = np.array(ours.score(batch))
    arrays["reference"] = batch["reference_logps"]
    arrays["row_pixels"] = np.repeat(arrays["pixels"], 2, axis=0)
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    ours.compile(batch)
    offset = ours.model_config.visual_offset
    sides = {f"{layout}: {setting}": Torch(sizes, weights, offset, layout, setting)
             for layout in LAYOUTS for setting in settings}  # fmt: skip
    differences = check(ours, sides, batch, tensors)
    steps = {name: functools.partial(side.step, tensors, False) for name, side in sides.items()}
    losses = train_step.agree({"ours": lambda: ours.step(batch), **steps})["losses"]
    runs: dict[str, Callable[[], Any]] = {
        "shared": lambda: ours.step(batch), "score": lambda: ours.score(batch),
    }  # fmt: skip
    named, seconds = {}, {}
    for layout in LAYOUTS:
        own = {name: step for name, step in steps.items() if name.startswith(f"{layout}:")}
        best, times = fastest(own)
        named[layout], seconds[layout] = SETTING + best.partition(": ")[2], times
        runs[layout] = steps[best]
        runs[f"{layout}_cached"] = functools.partial(sides[best].step, tensors, True)
    runs["once_score"] = functools.partial(sides[best].score, tensors)
    flops, forward = products(ours, batch), forward_flops(ours.model_config, batch)
    found = measure(runs, rounds)
    typical = medians(found)
    return {
        "ratios": ratio_rows(found, flops, RATIOS), "seconds": typical,
        "pairs_per_second": {n: sizes.rows / typical[n]["wall"] for n in ("shared", *LAYOUTS)},
        "setting": named, "settings": seconds, "trl": TRL,
        "largest_difference": differences, "losses": losses, "flops": flops,
        "vision / language": forward["vision"] / forward["language"],
        "sizes": dataclasses.asdict(sizes), "unroll": unroll,
        "prefix": batch["prefix_tokens"].shape[1], "rounds": rounds, "threads": threads,
        "load_average": os.getloadavg()[0], "process": process_settings(), "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = command_line.make_parser("dpo_video", __doc__)
    command_line.add_sizes(parser, Sizes)
    parser.add_argument(
        "--unroll", action="store_true", help="a copy of our program for each layer"
    )
    command_line.add_rounds(parser, 10)
    flags = parser.parse_args()
    require_cpu()
    sizes = command_line.read_sizes(flags, Sizes)
    result = run(sizes, flags.rounds, flags.threads, usable_settings(), flags.unroll)
    command_line.write_record(flags.out, result)
    for row in result["ratios"]:
        print(f"{row['ratio']:46s} wall {row['wall']:.2f}  cpu {row['cpu']:.2f}  "
              f"products {row['flops']:.2f}  target {row['target']}")  # fmt: skip
    for layout, setting in result["setting"].items():
        print(f"{layout}: {setting}")
    print(f"vision / language, forward products: {result['vision / language']:.2f}")


if __name__ == "__main__":
    main()
