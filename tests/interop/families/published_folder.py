"""Published folders of families with random weights, as a user would have downloaded them."""

import dataclasses
import json

import ml_dtypes
import numpy as np
from tokenizers import AddedToken

from tests.interop.families.configs import ONEVISION_JINJA
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop import folder
from tpo_jax.interop.families.registry import family_of, from_leaves
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

ROWS = 320  # of the token tables; the tokenizer has fewer ids
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>")


def sized(data):
    """config.json with tables of ROWS rows."""
    data = dict(data)
    for name in ("text_config", "llm_config"):
        if name in data:
            return data | {name: data[name] | {"vocab_size": ROWS}}
    return data | {"vocab_size": ROWS}


def write_published(path, data, dtype=ml_dtypes.bfloat16, scale=1.0, **carried):
    """`data` is of `sized`; `carried` are tensors that no leaf uses."""
    family = family_of(data)
    config = family.model_config(data, {})
    rng, leaves = np.random.default_rng(0), {}
    for name, leaf in flatten(FunctionalModel(config).abstract()).items():
        leaves[name] = (scale * rng.normal(size=leaf.shape)).astype(dtype)
    leaves["language/embed/table"][ROWS:] = 0
    for name in ("language/lm_head/kernel", "language/lm_head/lora_b"):
        if name in leaves:
            leaves[name][:, ROWS:] = 0
    tensors = from_leaves(family, config, leaves, carried, ())
    lazily = {name: lazy(tensor) for name, tensor in tensors.items()}
    write_file(path / "model.safetensors", lazily, {"format": "pt"})
    tokenizer = train_tokenizer(["You are a helpful assistant. What happens?"], 300)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS])
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "config.json").write_text(json.dumps(data))
    if family.needs_template:
        (path / "chat_template.jinja").write_text(ONEVISION_JINJA)
    # As of Qwen2: two stops, of which one also pads.
    stops = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    about = {"temperature": 0, "eos_token_id": stops}
    (path / "generation_config.json").write_text(json.dumps(about))


def train_heads(base, out, heads):
    """The folder `out`, of the model `base` with new heads; all else is that of `base`."""
    config, leaves, codec = (
        read(base) for read in (folder.load_config, folder.open_leaves, folder.load_codec)
    )
    add_task_tokens(codec.tokenizer, heads)
    codec = TextCodec(codec.tokenizer, codec.template)
    config = dataclasses.replace(config, heads=heads, tokens=codec.task_tokens)
    rng = np.random.default_rng(1)
    for name, leaf in flatten(FunctionalModel(config).abstract()).items():
        if name not in leaves:
            leaves[name] = lazy(rng.normal(size=leaf.shape).astype(np.float32))
    folder.write_model(out, config.to_dict(), leaves, codec,
                       preprocessor=folder.preprocessor(config))  # fmt: skip


def same_tensors(theirs, ours):
    """Two folders have the same tensors, bit for bit."""
    theirs, ours = read_tensors(theirs), read_tensors(ours)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        left, right = np.asarray(theirs[name]), np.asarray(ours[name])
        assert left.dtype == right.dtype and left.shape == right.shape, name
        assert left.tobytes() == right.tobytes(), name
