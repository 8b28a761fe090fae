"""The two-layer temporal head: its loss by hand, and what it answers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.heads import HEADS, ClipInfo, heads_of, temporal_mlp

HEAD = HEADS["temporal_mlp"]


def targets(*slots):
    windows = np.zeros((1, len(slots), 2, 2), np.float32)
    valid = np.zeros((1, len(slots), 2), bool)
    for slot, given in enumerate(slots):
        windows[0, slot, : len(given)] = np.reshape(given, (-1, 2))
        valid[0, slot, : len(given)] = True
    return {"windows": jnp.asarray(windows), "window_valid": jnp.asarray(valid)}


def test_the_nearest_window_counts_and_ends_may_be_swapped():
    spans = jnp.array([[[0.6, 0.2], [0.0, 0.5], [0.1, 0.2]]])
    wanted = targets([[0.7, 0.9], [0.3, 0.6]], [[0.5, 1.0]], [])
    terms = HEAD.loss({"spans": spans}, wanted, jnp.array([[True, True, True]]))
    l1, giou = terms["temporal_mlp/l1"], terms["temporal_mlp/giou"]
    assert float(l1.total) == pytest.approx(0.1 + 1.0, abs=1e-6) and float(l1.weight) == 2
    # [0.2, 0.6] with [0.3, 0.6]: 3/4; [0, 0.5] with [0.5, 1]: they touch, so 0.
    assert float(giou.total) == pytest.approx(0.25 + 1.0, abs=1e-5)


def test_an_answer_is_one_window_in_seconds():
    clip = ClipInfo(10.0, 20.0, np.array([10.0, 15.0, 19.0, 0]), np.arange(4) < 3, 8, 8)
    found = temporal_mlp.decode({"spans": np.array([0.95, 0.25])}, clip)
    assert found["windows"] == [pytest.approx([12.5, 19.5, 1.0])]
    assert found["saliency"] == [0, 1, 1] and found["times"] == [10, 15, 19]


def test_it_answers_temporal_questions_in_the_place_of_another_head():
    assert heads_of(["temporal_mlp"]) == {"temporal": "temporal_mlp"}
    with pytest.raises(ValueError, match="both answer 'temporal'"):
        heads_of(["temporal", "temporal_mlp"])
    same = ("marker", "routing_token", "slot_token")
    other = dataclasses.asdict(HEADS["temporal"])
    assert all(getattr(HEAD, name) == other[name] for name in same)
