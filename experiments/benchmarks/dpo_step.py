"""What a preference step costs: shared prefix against two rows, against SFT, against PyTorch.

    python -m experiments.benchmarks.dpo_step --out experiments/results/benchmarks/dpo_step.json

One language model, one set of weights and one set of pairs, whose prefix holds the visual
embeddings of 32 frames. All steps are forward, backward and AdamW in float32:

  shared   prefix once, both answers as branches of it; reference log-probabilities from a sidecar
  two_rows prefix and chosen, prefix and rejected, as two rows; the same sidecar
  sft      prefix once and the chosen answer
  score    forward pass of `shared`: what a sidecar costs, once a pair
  torch    the Llama of `transformers`, two rows, logits of the answers only, and a frozen reference
           in the step: TRL 1.16, which takes a video as a list of images, refuses
           precompute_ref_log_probs for vision datasets
  torch_cached   the same with precomputed log-probabilities

PyTorch runs in the fastest of `torch_settings` by the wall time of `torch`; the record names it,
and how both sides allocate memory (`process`; dpo_step.md says which way was fastest).
Both sides run on the CPU: where JAX has another device the command refuses.

Rounds run each of them twice, of which the second is timed, one after the other in turning order; a
ratio is taken within a round, and the median of rounds is reported, in wall time and in CPU time of
the process (which other work on the machine disturbs less). Beside it stands the ratio of the
matrix products. Before any
measurement, all of them have to agree: PyTorch on each log-probability, our two rows on the loss.
Layers are looped over as in large models. Unrolled (--unroll) the compiler sees that nothing reads
the last layer's output on the prefix and leaves it out, which in a model of few layers is much.
`dpo_video` is the same from pixels, with a vision tower.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait burn no CPU time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.benchmarks import command_line
from experiments.benchmarks.torch_settings import (
    SETTINGS,
    process_settings,
    require_cpu,
    usable_settings,
)
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import LanguageModel
from tpo_jax.models.layers import Rngs
from tpo_jax.objectives.language import language_loss
from tpo_jax.objectives.logps import token_logps
from tpo_jax.objectives.preference import PairTokens, PreferenceConfig, preference_losses
from tpo_jax.training.flops import matmul_flops

BETA, RATE = 0.3, 1e-5
OPTIONS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
TOLERANCE = 2e-3  # nats, float32 in three programs
SETTING = "transformers Llama, sdpa, no dropout, float32; torch.optim.AdamW; "  # and the fastest


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pairs of a step; tokens of a pair: frames * tokens_per_frame, in the text of system and
    question, and two answers."""

    pairs: int = 1
    frames: int = 32
    tokens_per_frame: int = 16
    text: int = 48
    answer: int = 47

    @property
    def prefix(self) -> int:
        return self.frames * self.tokens_per_frame + self.text

    @property
    def branch(self) -> int:
        """An answer and the token before it, from which its first token is predicted."""
        return self.answer + 1


def make_pairs(sizes: Sizes, config: LanguageConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """text int32[B, text], visual float32[B, V, D], branches int32[B, 2, R]."""
    rng = np.random.default_rng(seed)
    B, V = sizes.pairs, sizes.frames * sizes.tokens_per_frame
    visual = rng.normal(size=(B, V, config.width)) * config.width**-0.5
    tokens = rng.integers(0, config.vocab_size, (B, sizes.text + 2 * sizes.branch), np.int32)
    branches = tokens[:, sizes.text :].reshape(B, 2, -1)
    branches[:, 1, 0] = branches[:, 0, 0]  # the same assistant marker
    return {"text": tokens[:, : sizes.text], "visual": visual.astype(np.float32),
            "branches": branches}  # fmt: skip


class Ours:
    """The steps in JAX."""

    def __init__(self, config: LanguageConfig, seed: int = 0):
        self.config = config
        self.structure, state = nnx.split(LanguageModel(config, rngs=Rngs(seed)))
        self.params = nnx.to_pure_dict(state)
        self.optimizer = optax.adamw(RATE, **OPTIONS)

    def bind(self, params: Any) -> LanguageModel:
        return nnx.merge(self.structure, nnx.State(jax.tree.map(nnx.Param, params)))

    def prefix(self, model: LanguageModel, batch: Any) -> jax.Array:
        """float[B, P, D]: half of the text, the frames, the other half."""
        text = model.embed_tokens(batch["text"])
        half = text.shape[1] // 2
        return jnp.concatenate([text[:, :half], batch["visual"], text[:, half:]], axis=1)

    def shared_logps(self, params: Any, batch: Any) -> jax.Array:
        """float32[B, K, A] with each prefix once and K branches of it."""
        model = self.bind(params)
        prefix = self.prefix(model, batch)
        (B, P, _), (_, K, R) = prefix.shape, batch["branches"].shape
        ones = jnp.ones((B, P), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(P), (B, P))
        at = jnp.broadcast_to(P + jnp.arange(R), (B, K, R))
        branches = model.embed_tokens(batch["branches"]), at, jnp.ones((B, K, R), jnp.int32)
        _, hidden = model((prefix, positions, ones), branches)
        return token_logps(hidden[:, :, :-1], model.table, batch["branches"][:, :, 1:])

    def row_logps(self, params: Any, batch: Any) -> jax.Array:
        """The same with one row for each branch."""
        model = self.bind(params)
        B, K, R = batch["branches"].shape
        branches = model.embed_tokens(batch["branches"]).reshape(B * K, R, -1)
        rows = jnp.concatenate([jnp.repeat(self.prefix(model, batch), K, axis=0), branches], axis=1)
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])
        hidden, _ = model.prefill(rows, positions, jnp.ones(rows.shape[:2], jnp.int32))
        hidden = hidden[:, -R:-1].reshape(B, K, R - 1, -1)
        return token_logps(hidden, model.table, batch["branches"][:, :, 1:])

    def dpo(self, logps: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        options = PreferenceConfig(beta=BETA)

        def loss(params: Any, batch: Any) -> jax.Array:
            policy = logps(params, batch)
            pair = PairTokens(
                policy, batch["reference"], jnp.ones_like(policy), jnp.ones(len(policy))
            )
            return preference_losses(pair, options)["sigmoid"].mean()

        return loss

    def sft(self, params: Any, batch: Any) -> jax.Array:
        chosen = self.shared_logps(params, batch | {"branches": batch["branches"][:, :1]})
        return language_loss(chosen, jnp.ones_like(chosen)).mean()

    def losses(self) -> dict[str, Callable[..., jax.Array]]:
        return {"shared": self.dpo(self.shared_logps), "two_rows": self.dpo(self.row_logps),
                "sft": self.sft}  # fmt: skip

    def step(self, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
        def step(params: Any, state: Any, batch: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        return step


class Torch:
    """The same model in PyTorch, in one of SETTINGS."""

    def __init__(self, ours: Ours, threads: int, setting: str = "eager"):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        config = ours.config
        make = transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width,
            intermediate_size=config.mlp_width, num_hidden_layers=config.depth,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim, rms_norm_eps=config.norm_epsilon,
            max_position_embeddings=32768, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        self.policy, self.reference = (transformers.LlamaForCausalLM(make) for _ in range(2))
        weights = {name: torch.tensor(x) for name, x in llama_weights(ours).items()}
        for model in (self.policy, self.reference):
            model.load_state_dict(weights)
        self.reference.requires_grad_(False)
        options = {"betas": (OPTIONS["b1"], OPTIONS["b2"]), "eps": OPTIONS["eps"]}
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=RATE, weight_decay=OPTIONS["weight_decay"],
            fused=SETTINGS[setting]["fused"], **options,
        )  # fmt: skip
        if SETTINGS[setting]["compiled"]:
            self.policy, self.reference = map(torch.compile, (self.policy, self.reference))

    def logps(self, model: Any, batch: Any) -> Any:
        """float[B, 2, A], two rows a pair."""
        torch = self.torch
        embed = model.get_input_embeddings()
        text, branches = embed(batch["text"]), embed(batch["branches"])
        half = text.shape[1] // 2
        prefix = torch.cat([text[:, :half], batch["visual"], text[:, half:]], dim=1)
        rows = torch.cat([prefix.repeat_interleave(2, 0), branches.flatten(0, 1)], dim=1)
        R = branches.shape[2]
        logits = model(inputs_embeds=rows, logits_to_keep=R).logits[:, :-1]
        targets = batch["branches"].flatten(0, 1)[:, 1:, None]
        return logits.log_softmax(-1).gather(-1, targets)[..., 0].unflatten(0, (-1, 2))

    def step(self, batch: Any, cached: bool) -> float:
        torch = self.torch
        policy = self.logps(self.policy, batch)
        if cached:
            reference = batch["reference"]
        else:
            with torch.no_grad():
                reference = self.logps(self.reference, batch)
        ratio = (policy - reference).sum(-1)
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def llama_weights(ours: Ours) -> dict[str, np.ndarray]:
    """Our parameters under the names of transformers' Llama."""
    params = jax.tree.map(np.array, ours.params)
    weights = {
        "model.embed_tokens.weight": params["embed"]["table"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for block, parts in params["layers"].items():
        for name, leaves in ({"": parts} if "scale" in parts else parts).items():
            path = f"{block}.{name}".removesuffix(".")
            for index, leaf in enumerate(leaves.get("scale", leaves.get("kernel"))):
                weights[f"model.layers.{index}.{path}.weight"] = leaf.T  # a vector is its own
    return {name: np.ascontiguousarray(x) for name, x in weights.items()}


def fastest(steps: Mapping[str, Callable[[], Any]], rounds: int = 3) -> tuple[str, dict]:
    """The name of the step with the lowest median of wall seconds, and the medians of all."""
    seconds = medians(measure(dict(steps), rounds))
    return min(seconds, key=lambda name: seconds[name]["wall"]), seconds


def compiled_steps(ours: Ours, batch: Any) -> dict[str, Any]:
    """{name: compiled step}."""
    losses = ours.losses()
    state = ours.optimizer.init(ours.params)
    steps = {
        name: jax.jit(ours.step(loss), donate_argnums=(0, 1))
        .lower(ours.params, state, batch)
        .compile()
        for name, loss in losses.items()
    }
    steps["score"] = jax.jit(ours.shared_logps).lower(ours.params, batch).compile()
    return steps


def products(config: LanguageConfig, batch: Any) -> dict[str, float]:
    """{name: FLOPs of the matrix products of a step}, attention counted dense."""
    ours = Ours(dataclasses.replace(config, attention="dense"))
    state = ours.optimizer.init(ours.params)
    flops = {
        name: matmul_flops(ours.step(loss), ours.params, state, batch)
        for name, loss in ours.losses().items()
    }
    flops["score"] = matmul_flops(ours.shared_logps, ours.params, batch)
    flops["torch_cached"] = flops["two_rows"]
    flops["torch"] = flops["two_rows"] + matmul_flops(ours.row_logps, ours.params, batch)
    return flops


def trainer(step: Any, ours: Ours, batch: Any) -> Callable[[], float]:
    """A function that trains its own copy of the weights, whose memory every step uses again, by
    one step and returns the loss."""
    params = jax.tree.map(jnp.copy, ours.params)
    held = [params, ours.optimizer.init(params)]

    def run() -> float:
        *held[:], value = step(*held, batch)
        return float(jax.block_until_ready((held, value))[1])

    return run


def activation_bytes(ours: Ours, batch: Any) -> dict[str, int]:
    """Temporary memory of each loss's gradient; the gradient itself is a result, not counted."""
    found = {}
    for name, loss in ours.losses().items():
        compiled = jax.jit(jax.value_and_grad(loss)).lower(ours.params, batch).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes
    return found


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """{name: [(wall, cpu) of each round]}; the order turns from round to round.

    What is timed follows a run of its own, as a step follows a step in training: after another
    program's the caches and the memory of the process are in that one's state.
    """
    found: dict[str, list] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name]()
            found[name].append(timed(runs[name]))
        print(number, {name: round(times[-1][0], 2) for name, times in found.items()}, flush=True)
    return found


def medians(found: Mapping[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """{name: {"wall", "cpu"}}, seconds."""
    kinds = {"wall": 0, "cpu": 1}
    return {
        name: {kind: statistics.median(t[i] for t in times) for kind, i in kinds.items()}
        for name, times in found.items()
    }


# ratio: what is divided by what (sums of names), the target, and whether more is better.
Ratios = Mapping[str, tuple[tuple[str, ...], tuple[str, ...], float | None, bool]]
RATIOS: Ratios = {
    "two_rows / shared": (("two_rows",), ("shared",), 1.7, True),
    "shared / sft": (("shared",), ("sft",), 1.15, False),
    "torch / shared": (("torch",), ("shared",), 2.6, True),
    "torch / (shared + score)": (("torch",), ("shared", "score"), 2.0, True),
    "torch_cached / shared": (("torch_cached",), ("shared",), None, True),
}


def ratio_rows(
    found: dict[str, list], flops: dict[str, float], ratios: Ratios
) -> list[dict[str, Any]]:
    rows = []
    for name, (above, below, target, more) in ratios.items():
        row: dict[str, Any] = {"ratio": name, "target": target}
        for kind, index in (("wall", 0), ("cpu", 1)):
            each = [
                sum(found[n][i][index] for n in above) / sum(found[n][i][index] for n in below)
                for i in range(len(found["shared"]))
            ]
            row[kind] = statistics.median(each)
            row[f"{kind}_quartiles"] = [float(x) for x in np.quantile(each, [0.25, 0.75])]
        row["flops"] = sum(flops[n] for n in above) / sum(flops[n] for n in below)
        if target is not None:
            row["met"] = row["wall"] >= target if more else row["wall"] <= target
        rows.append(row)
    return rows


def run(sizes: Sizes, config: LanguageConfig, rounds: int, threads: int,
        settings: Sequence[str]) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark; see the module.

    Args:
      settings: of SETTINGS, "eager" first, whose fastest is the baseline.
    """
    ours = Ours(config)
    batch = jax.tree.map(jnp.asarray, make_pairs(sizes, config))
    batch["reference"] = jnp.zeros((sizes.pairs, 2, sizes.answer))
    steps, flops = compiled_steps(ours, batch), products(config, batch)
    shared = batch["reference"] = steps["score"](ours.params, batch)
    runs = {name: trainer(steps[name], ours, batch) for name in ("shared", "two_rows", "sft")}
    runs["score"] = lambda: jax.block_until_ready(steps["score"](ours.params, batch))
    # The policy is the reference: any difference between the layouts moves the loss from log 2.
    differences = {name: abs(runs[name]() - math.log(2)) for name in ("shared", "two_rows")}
    sides = {name: Torch(ours, threads, name) for name in settings}
    eager = sides["eager"]
    tensors = {name: eager.torch.tensor(np.asarray(x)) for name, x in batch.items()}
    tensors |= {name: tensors[name].long() for name in ("text", "branches")}
    with eager.torch.no_grad():
        logps = eager.logps(eager.policy, tensors).numpy()
    differences["torch"] = float(np.abs(logps - np.asarray(shared)).max())
    for name, difference in differences.items():
        if difference > TOLERANCE:
            raise AssertionError(f"{name} differs by {difference} from the shared prefix")
    of_sides = {n: functools.partial(s.step, tensors, cached=False) for n, s in sides.items()}
    setting, seconds = fastest(of_sides)
    runs["torch"] = of_sides[setting]
    runs["torch_cached"] = functools.partial(sides[setting].step, tensors, cached=True)
    found = measure(runs, rounds)
    memory = activation_bytes(ours, batch)
    implied = (sizes.prefix + 2 * sizes.branch) / (2 * (sizes.prefix + sizes.branch))
    return {
        "ratios": ratio_rows(found, flops, RATIOS),
        "memory": {
            "shared / two_rows": memory["shared"] / memory["two_rows"], "target": 0.6,
            "met": memory["shared"] <= 0.6 * memory["two_rows"], "tokens": implied,
            "temp_bytes": memory,
        },
        "seconds": medians(found), "setting": SETTING + setting, "settings": seconds,
        "largest_difference": differences, "flops": flops,
        "sizes": dataclasses.asdict(sizes),
        "prefix_over_branch": sizes.prefix / sizes.branch, "rounds": rounds, "threads": threads,
        "model": dataclasses.asdict(config), "platform": jax.devices()[0].platform,
        "load_average": os.getloadavg()[0], "process": process_settings(), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    import importlib.metadata

    names = ("jax", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def model_config(width: int, depth: int, unroll: bool = False) -> LanguageConfig:
    return LanguageConfig(
        vocab_size=2048, width=width, depth=depth, heads=width // 32, kv_heads=width // 64,
        head_dim=32, mlp_width=3 * width, unroll=unroll,
    )  # fmt: skip


def main() -> None:
    parser = command_line.make_parser("dpo_step", __doc__)
    command_line.add_sizes(parser, Sizes)
    add = parser.add_argument
    add("--width", type=int, default=256, help="(default: %(default)s)")
    add("--depth", type=int, default=4, help="(default: %(default)s)")
    add("--unroll", action="store_true", help="a copy of the program for each layer")
    command_line.add_rounds(parser, 12)
    flags = parser.parse_args()
    require_cpu()
    sizes = command_line.read_sizes(flags, Sizes)
    config = model_config(flags.width, flags.depth, flags.unroll)
    result = run(sizes, config, flags.rounds, flags.threads, usable_settings())
    command_line.write_record(flags.out, result)
    for row in result["ratios"]:
        print(f"{row['ratio']:26s} wall {row['wall']:.2f}  cpu {row['cpu']:.2f}  "
              f"products {row['flops']:.2f}  target {row['target']}")  # fmt: skip
    print("memory", {k: v for k, v in result["memory"].items() if k != "temp_bytes"})


if __name__ == "__main__":
    main()
