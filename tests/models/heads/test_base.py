import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.heads import HEADS, tokens_of
from tpo_jax.models.heads.base import SlotAttention


def test_every_head_has_its_own_tokens():
    assert all(name == head.name for name, head in HEADS.items())
    tokens = tokens_of(HEADS)
    assert tokens == (
        "<box_begin>", "<boxes>", "<time_begin>", "<temp>", "<track_begin>", "<tracking>",
        "<track_box>",
    )  # fmt: skip
    assert tokens_of(("temporal",)) == ("<time_begin>", "<temp>", "<track_box>")
    assert tokens_of(()) == ()


def test_slot_attention_is_attention_with_projected_keys_and_values():
    layer = SlotAttention(8, 2, rngs=nnx.Rngs(0))
    for name in ("k_proj", "v_proj"):
        bias = getattr(layer, name).bias
        bias.set_value(jax.random.normal(jax.random.key(5), (8,)))
    queries = jax.random.normal(jax.random.key(1), (3, 2, 8))
    tokens = jax.random.normal(jax.random.key(2), (3, 7, 8))

    def split(x):
        return x.reshape(3, -1, 2, 4)

    q = split(layer.q_proj(layer.query_norm(queries)))
    mixed = attention(q, split(layer.k_proj(tokens)), split(layer.v_proj(tokens)))
    expected = queries + layer.o_proj(mixed.reshape(3, 2, 8))
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    np.testing.assert_allclose(layer(queries, tokens), expected, atol=1e-5)
    assert jnp.abs(expected - queries).max() > 0.1
