"""The Q-Former against BLIP-2's in `transformers`: BERT layers of which every second reads."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.towers import difference, randomise, run, tensors_of, with_weights
from tpo_jax.interop.families.videochat import qformer_rows
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.connectors.registry import make_connector

pytestmark = pytest.mark.parity
CONFIG = QFormerConfig(queries=3, extra_queries=5, width=24, depth=4, heads=2, mlp_width=40)


def _name(key):
    """Their name in the layout of VideoChat2."""
    key = key.replace("layernorm.", "embeddings.LayerNorm.")
    for block in ("attention", "crossattention"):
        key = key.replace(f".{block}.attention.", f".{block}.self.")
    return f"qformer.bert.{key}"


def test_queries_read_a_clip():
    import torch
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    theirs = randomise(Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=40,
        encoder_hidden_size=16, cross_attention_frequency=2, use_qformer_text_input=False,
        attn_implementation="eager",
    )))  # fmt: skip
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(1, 8, 24)).astype(np.float32)
    tensors = tensors_of(theirs, _name) | {
        "query_tokens": queries[:, :3], "extra_query_tokens": queries[:, 3:],
        "project_up.weight": np.zeros((20, 24), np.float32),
        "project_up.bias": np.zeros(20, np.float32),
    }  # fmt: skip
    make = functools.partial(make_connector, CONFIG, 16, 20)
    ours = with_weights(make, qformer_rows(""), tensors)
    tokens = rng.normal(size=(2, 7, 16)).astype(np.float32)
    valid = np.array([[1] * 7, [1] * 4 + [0] * 3])
    expected = theirs(
        query_embeds=torch.from_numpy(np.repeat(queries, 2, axis=0)),
        encoder_hidden_states=torch.from_numpy(tokens),
        encoder_attention_mask=torch.from_numpy(valid),
    ).last_hidden_state
    found = run(ours, jnp.asarray(tokens), jnp.asarray(valid, bool), method="read")
    assert difference(found, expected) < 2e-4
