import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tpo_jax.models.attention import attention
from tpo_jax.models.heads import HEADS, tokens_of
from tpo_jax.models.heads.base import (
    HeadInputs,
    SlotAttention,
    SlotQuery,
    cell_centres,
    cells_inside,
    frame_centres,
    position_waves,
)
from tpo_jax.models.presets import micro


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


def test_a_slot_reads_the_words_of_its_question_and_no_others():
    config = micro(("region",))
    query, D = SlotQuery(config, rngs=nnx.Rngs(0)), config.language.width
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (*shape, D))  # noqa: E731
    valid = jnp.arange(5) < jnp.array([3, 5])[None, :, None]
    prompt, embeds = draw(1, 1, 2, 5), draw(2, 1, 2, 5)

    def read(prompt, embeds):
        inputs = HeadInputs(
            draw(0, 1, 2), None, None, None, None, prompt=prompt, prompt_embeds=embeds,
            prompt_valid=valid,
        )  # fmt: skip
        return np.asarray(query(inputs))[0]

    want = read(prompt, embeds)
    for changed in (read(prompt.at[0, :, 4].add(1.0), embeds),
                    read(prompt, embeds.at[0, :, 4].add(draw(3)))):  # fmt: skip
        np.testing.assert_allclose(changed[0], want[0], atol=1e-6)
        assert np.abs(changed[1] - want[1]).max() > 1e-3
    with pytest.raises(ValueError, match="prompt_embeds is missing"):
        read(prompt, None)


def test_positions_are_centres_of_cells_and_of_valid_frames():
    np.testing.assert_allclose(
        cell_centres(1, 2), [[0.25, 0.5], [0.75, 0.5]], err_msg="x, y, rows first"
    )
    np.testing.assert_allclose(cell_centres(2, 1), [[0.5, 0.25], [0.5, 0.75]])
    valid = jnp.array([[True, True, False, False], [True, True, True, True]])
    centres = frame_centres(valid)
    np.testing.assert_allclose(centres[0, :2], [0.25, 0.75])
    np.testing.assert_allclose(centres[1], [0.125, 0.375, 0.625, 0.875])


def test_cells_inside_share_a_box_and_a_tiny_box_has_its_nearest_cell():
    boxes = jnp.array([[0.0, 0.25, 0.5, 0.6], [0.9, 0.9, 0.95, 0.95]])
    labels = np.asarray(cells_inside(boxes, 4, 4)).reshape(2, 4, 4)
    expected = np.zeros((2, 4, 4))
    expected[0, 1, :2] = 0.5  # centres of rows are at 0.125, 0.375, 0.625 and 0.875
    expected[1, 3, 3] = 1.0
    np.testing.assert_allclose(labels, expected)


def test_position_waves_tell_any_two_of_32_places_apart():
    waves = np.asarray(position_waves((jnp.arange(32)[:, None] + 0.5) / 32))
    assert waves.shape == (32, 12)
    apart = np.abs(waves[:, None] - waves).max(axis=-1) + np.eye(32)
    assert apart.min() > 0.5
