import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.heads import ClipInfo
from tpo_jax.models.heads.temporal import assign, decode, loss

CENTRES = (jnp.arange(4) + 0.5)[None] / 4  # 0.125, 0.375, 0.625, 0.875
VALID = jnp.ones((1, 4), bool)


def _assign(windows, valid=None, frames=VALID):
    windows = jnp.array(windows, jnp.float32)[None, None]
    valid = jnp.ones(windows.shape[:3], bool) if valid is None else jnp.array(valid)[None, None]
    foreground, target = assign(CENTRES, frames, windows, valid)
    return np.asarray(foreground[0, 0]), np.asarray(target[0, 0])


def test_frames_inside_answer_for_the_shortest_window():
    foreground, target = _assign([[0.0, 0.7], [0.3, 0.5]])
    assert foreground.tolist() == [True, True, True, False]
    np.testing.assert_allclose(target[:3], [[0.0, 0.7], [0.3, 0.5], [0.0, 0.7]])


def test_a_window_between_frames_goes_to_the_nearest():
    foreground, target = _assign([[0.4, 0.45]])
    assert foreground.tolist() == [False, True, False, False]
    np.testing.assert_allclose(target[1], [0.4, 0.45])


def test_padded_frames_and_padded_windows_are_nothing():
    foreground, _ = _assign([[0.0, 1.0], [0.0, 0.0]], valid=[True, False])
    assert foreground.all()
    foreground, _ = _assign([[0.8, 0.9]], frames=jnp.array([[True, True, False, False]]))
    assert foreground.tolist() == [False, True, False, False]
    foreground, _ = _assign([[0.2, 0.3]], valid=[False])
    assert not foreground.any()


def _perfect(windows, saliency):
    spans = jnp.broadcast_to(jnp.array(windows[0]), (1, 1, 4, 2))
    inside = (CENTRES >= windows[0][0]) & (CENTRES <= windows[0][1])
    return {
        "foreground": jnp.where(inside, 20.0, -20.0)[:, None], "spans": spans,
        "saliency": jnp.where(jnp.array(saliency) > 0.5, 20.0, -20.0)[None, None],
        "centres": CENTRES, "frame_valid": VALID,
    }  # fmt: skip


def test_perfect_predictions_cost_nothing_and_wrong_ones_do():
    windows, saliency = [[0.3, 0.7]], [0.0, 1.0, 1.0, -1.0]
    targets = {
        "windows": jnp.array(windows)[None, None], "window_valid": jnp.ones((1, 1, 1), bool),
        "saliency": jnp.array(saliency)[None, None],
    }  # fmt: skip
    valid = jnp.ones((1, 1), bool)
    perfect = _perfect(windows, saliency)
    for name, term in loss(perfect, targets, valid).items():
        np.testing.assert_allclose(term.mean(), 0.0, atol=1e-5, err_msg=name)
        assert term.weight == 1
    wrong = perfect | {
        "foreground": -perfect["foreground"], "saliency": -perfect["saliency"],
        "spans": perfect["spans"] + 0.1,
    }  # fmt: skip
    terms = loss(wrong, targets, valid)
    np.testing.assert_allclose(terms["temporal/foreground"].mean(), 20.0, rtol=1e-4)
    np.testing.assert_allclose(terms["temporal/l1"].mean(), 0.2, rtol=1e-4)
    np.testing.assert_allclose(terms["temporal/giou"].mean(), 1 - 0.3 / 0.5, rtol=1e-4)
    # BCE 20 on three labelled frames, hinge 0.5 + 40 on both ranked pairs.
    np.testing.assert_allclose(terms["temporal/saliency"].mean(), 60.5, rtol=1e-4)


def test_unlabelled_saliency_and_missing_windows_weigh_nothing():
    targets = {
        "windows": jnp.zeros((1, 1, 1, 2)), "window_valid": jnp.zeros((1, 1, 1), bool),
        "saliency": -jnp.ones((1, 1, 4)),
    }  # fmt: skip
    terms = loss(_perfect([[0.3, 0.7]], [1.0] * 4), targets, jnp.ones((1, 1), bool))
    assert {name: float(term.weight) for name, term in terms.items()} == dict.fromkeys(terms, 0.0)


def test_decode_gives_several_windows_in_seconds_best_first():
    prediction = {
        "foreground": np.array([3.0, -9.0, 1.0, 9.0]),
        "spans": np.array([[0.0, 0.2], [0.0, 1.0], [0.5, 0.75], [0.0, 1.0]]),
        "saliency": np.array([0.0, 9.0, -9.0, 9.0]),
    }
    clip = ClipInfo(
        start=10.0, end=20.0, times=np.array([11.0, 14.0, 16.0, 19.0]),
        frame_valid=np.array([True, True, True, False]), height=8, width=8,
    )  # fmt: skip
    result = decode(prediction, clip)
    assert [w[:2] for w in result["windows"]] == [[10.0, 12.0], [15.0, 17.5]]
    assert result["windows"][0][2] == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert result["times"] == [11.0, 14.0, 16.0]
    np.testing.assert_allclose(result["saliency"], [0.5, 1.0, 0.0], atol=1e-3)
