"""Published folders of tiny random models, written without torch."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tokenizers import AddedToken

from tests.interop.families.configs import ONEVISION_JINJA
from tpo_jax.data.text import add_task_tokens, train_tokenizer
from tpo_jax.interop import folder
from tpo_jax.interop.families import tpo_heads
from tpo_jax.interop.families.registry import family_of, from_leaves
from tpo_jax.models.heads import tokens_of
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>")
# Of the tokenizer and of the model, which has rows for more.
WORDS, VOCABULARY = 300, 320
# Words before a clip, and between it and the question.
BEFORE, AFTER = 6, 2
# Logits of `transformers`; `python -m tests.parity.test_whole_families` writes them.
GOLDEN = pathlib.Path(__file__).parent / "whole_logits.npz"
GOLDEN_EVERY = 8  # one logit in so many is kept
# A name that tells which of the layouts of a family its published files have.
_NAMES = {"llava_onevision": ("vision_tower.vision_model.x",),
          "video_llava": ("image_tower.vision_model.x",)}  # fmt: skip


def with_vocabulary(data):
    """A config.json whose language model has room for the tokenizer of `write_folder`."""
    name = next((n for n in ("text_config", "llm_config") if n in data), None)
    size = {"vocab_size": VOCABULARY}
    return data | ({name: data[name] | size} if name else size)


def write_folder(path, data, seed=0, heads=()):
    """A published folder with random float32 weights, config.json and tokenizer.json; `heads` are
    those of VideoChat-TPO's release that it has."""
    path.mkdir(exist_ok=True)
    data = with_vocabulary(data)
    family = family_of(data)
    config = family.model_config(data, {})
    tokenizer = train_tokenizer(["You are a helpful assistant. USER: ASSISTANT:"], WORDS)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    if heads:
        add_task_tokens(tokenizer, heads)
        keys = {tpo_heads.HEADS[name][1] for name in heads}
        config = dataclasses.replace(
            family.with_heads(config, keys, heads, data),
            tokens={token: tokenizer.token_to_id(token) for token in tokens_of(heads)},
        )
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, leaf in flatten(FunctionalModel(config).abstract()).items():
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        leaves[name] = (scale * rng.normal(size=leaf.shape)).astype(np.float32)
        if name.endswith("scale"):
            leaves[name] += 1
        if name == "language/embed/table":  # rows that no token uses
            leaves[name][VOCABULARY:] = 0
        if name in ("language/lm_head/kernel", "language/lm_head/lora_b"):
            leaves[name][:, VOCABULARY:] = 0
    names = _NAMES.get(family.name, ())
    tensors = {k: np.ascontiguousarray(v) for k, v in
               from_leaves(family, config, leaves, {}, names).items()}  # fmt: skip
    safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "config.json").write_text(json.dumps(data))
    if family.needs_template:
        (path / "chat_template.jinja").write_text(ONEVISION_JINJA)


def prompt(config, frames=3, seed=2):
    """A batch of one row, a random clip between random words, and int64[T], the same tokens in one
    row with the visual ones as -1. It has no template: the config's visual_offset is BEFORE."""
    rng = np.random.default_rng(seed)
    visual, side = config.num_visual_tokens(frames), config.vision.image_size
    P, R = BEFORE + visual + AFTER, 9
    words = rng.integers(20, 280, P + R).astype(np.int32)
    batch = {
        "frames": rng.integers(0, 256, (1, frames, side, side, 3)).astype(np.uint8),
        "frame_valid": np.ones((1, frames), bool),
        "frame_times": np.arange(frames, dtype=np.float32)[None],
        "prefix_tokens": words[None, :P], "prefix_positions": np.arange(P, dtype=np.int32)[None],
        "prefix_segments": np.ones((1, P), np.int32), "branch_tokens": words[None, None, P:],
        "branch_positions": np.arange(P, P + R, dtype=np.int32)[None, None],
        "branch_segments": np.ones((1, 1, R), np.int32), "slots": {},
    }  # fmt: skip
    ids = words.astype(np.int64)
    ids[BEFORE : BEFORE + visual] = -1
    return batch, ids


def load(path):
    """(model, parameters, codec) of a model folder, for a `prompt`."""
    config, params, codec = folder.load_model(path)
    config = dataclasses.replace(config, visual_offset=BEFORE)
    return FunctionalModel(config), jax.tree.map(jnp.asarray, params), codec


def forward(model, params, batch, layers=True):
    """States float[L + 1, T, D] after every decoder layer and the final norm, and logits
    float[T, V] of `prompt`; compile it. Logits are of the forward pass of training.

    Args:
      layers: whether states of the layers are wanted; else states have the last entry alone.
    """
    bound, config = model.bind(params), model.config
    outputs = bound(batch)
    table = bound.language.table[: config.language.num_tokens]
    hidden = jnp.concatenate([outputs.prefix_hidden[0], outputs.branch_hidden[0, 0]])
    if not layers:
        return hidden[None], hidden @ table.T
    prefix = bound.embed_prefix(batch["prefix_tokens"], outputs.encoded.visual)
    branch = bound.embed_tokens(batch["branch_tokens"])[0, 0]
    whole = jnp.concatenate([prefix[0], branch])[None]
    T = whole.shape[1]
    states = bound.language.layer_states(whole, np.arange(T)[None], np.ones((1, T), np.int32))
    return jnp.concatenate([states[:, 0], hidden[None]]), hidden @ table.T
