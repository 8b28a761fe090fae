"""Runs a language model here and in `transformers` on the same tokens, layer by layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from tpo_jax.interop import folder, peft
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import bind
from tpo_jax.parallel.paths import unflatten

TOKENS = 48


def compare_language(
    model: epath.PathLike, exported: epath.PathLike, seed: int = 0
) -> dict[str, float]:
    """Largest absolute difference, in float32, after each layer, in the order of computation.

    Args:
      model: language folder, or a model folder, whose language model is taken.
      exported: Hugging Face folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    leaves = folder.open_leaves(model)
    if folder.holds_language_only(model):
        config, _ = folder.load_language(model)
    else:
        whole = folder.load_config(model)
        config = whole.language
        leaves = peft.merged_leaves(leaves, whole.lora) if whole.lora else leaves
    params = unflatten({
        path: np.asarray(leaf, np.float32)
        for path, leaf in leaves.items() if path.startswith("language/")
    })["language"]  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    return compare_parameters(config, params, theirs, seed)


def compare_parameters(
    config: LanguageConfig, params: Any, theirs: Any, seed: int
) -> dict[str, float]:
    """The same of parameters below "language" and a model of `transformers` in float32."""
    import torch

    tokens = np.random.default_rng(seed).integers(0, config.num_tokens, (1, TOKENS))
    positions = np.arange(TOKENS)[None]
    embeds, states, last, logits = forward(config, params, tokens, positions, np.ones_like(tokens))

    expected, out = layer_outputs(
        theirs.model.layers, lambda: theirs(torch.tensor(tokens), output_hidden_states=True)
    )
    differences = {"language/embed": _difference(embeds, out.hidden_states[0])}
    for number, (state, wanted) in enumerate(zip(states, expected, strict=True)):
        differences[f"language/layer {number}"] = _difference(state, wanted)
    differences["language/final_norm"] = _difference(last, out.hidden_states[-1])
    their_logits = out.logits[..., : config.num_tokens]
    return differences | {"language/logits": _difference(logits, their_logits)}


def layer_outputs(layers: Any, run: Callable[[], Any]) -> tuple[list[Any], Any]:
    """What each of PyTorch's layers gives [B, T, D] while `run` runs, and what `run` returns."""
    import torch

    collected: dict[int, Any] = {}

    def keep(number: int, layer: Any, inputs: Any, output: Any) -> None:
        collected[number] = output[0] if isinstance(output, tuple) else output

    hooks = [
        layer.register_forward_hook(functools.partial(keep, number))
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        out = run()
    for hook in hooks:
        hook.remove()
    return [collected[number] for number in range(len(hooks))], out


@functools.partial(jax.jit, static_argnums=0)
def forward(
    config: LanguageConfig, params: Any, tokens: jax.Array, positions: jax.Array,
    segments: jax.Array,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """All that a language model computes on the way, of int32[B, T] each.

    Returns: embeddings [B, T, D]; states [L, B, T, D] after each layer; after the final norm
      [B, T, D]; logits [B, T, num_tokens].
    """
    model = bind(config, params)
    embeds = model.embed_tokens(tokens)
    return embeds, *states_of(model, embeds, positions, segments)


def states_of(
    model: Any, embeds: jax.Array, positions: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same from the embeddings on: states, after the final norm, logits."""
    states = model.layer_states(embeds, positions, segments)
    last = model.final_norm(states[-1])
    logits = last @ model.table.T.astype(last.dtype)
    return states, last, logits[..., : model.config.num_tokens]


def _difference(ours: jax.Array, theirs: Any) -> float:
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs.numpy())))
