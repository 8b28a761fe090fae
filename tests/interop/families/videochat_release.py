"""Tensor names of the published VideoChat-TPO, and a tiny folder that has some of them."""

import itertools
import json
import pathlib
import re

import ml_dtypes
import numpy as np
from tokenizers import AddedToken

from tpo_jax.data.text import train_tokenizer
from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

TOKENS = ("<box_begin>", "<time_begin>", "<temp>", "<boxes>", "<track_begin>", "<tracking>",
          "<track_box>")  # fmt: skip
ROWS = 320  # of the token tables; the tokenizer has fewer ids


def published_keys():
    """Of the index of OpenGVLab/TPO, all but those of tower, Q-Former and language model."""
    lines = (pathlib.Path(__file__).parent / "videochat_tpo_head_keys.txt").read_text().split()
    for line in lines:
        pieces = re.split(r"\{([\d,-]+)\}", line)
        yield from map("".join, itertools.product(*(
            numbers(piece) if i % 2 else [piece] for i, piece in enumerate(pieces))))  # fmt: skip


def numbers(text):
    if "-" in text:
        first, last = map(int, text.split("-"))
        return map(str, range(first, last + 1))
    return text.split(",")


def random_leaves(config):
    """Of a model, bfloat16; rows of the tables that no token uses are zero."""
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in flatten(FunctionalModel(config).abstract()).items():
        leaves[path] = (0.3 * rng.normal(size=leaf.shape)).astype(ml_dtypes.bfloat16)
    leaves["language/embed/table"][ROWS:] = 0
    for path in ("kernel", "lora_b"):
        leaves[f"language/lm_head/{path}"][:, ROWS:] = 0
    return leaves


def write_release(path, data, tensors):
    """The folder, with its tokenizer and `data` as config.json."""
    lazily = {name: lazy(tensor) for name, tensor in tensors.items()}
    write_file(path / "model.safetensors", lazily, {"format": "pt"})
    tokenizer = train_tokenizer(["[INST] What happens? [/INST]"], 300)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in TOKENS])
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    (path / "config.json").write_text(json.dumps(data))
