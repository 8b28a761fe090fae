"""Windows: they must not be guessable without the video."""

import numpy as np

from tpo_jax.data.moving_shapes import WorldConfig
from tpo_jax.data.moving_shapes.plan import sample_plan
from tpo_jax.data.moving_shapes.timeline import sample_windows


def _iou(start, end, windows):
    inter = np.clip(np.minimum(end, windows[:, 1]) - np.maximum(start, windows[:, 0]), 0, None)
    return inter / (end - start + windows[:, 1] - windows[:, 0] - inter)


def test_best_constant_window_is_seldom_right():
    rng = np.random.default_rng(0)
    config = WorldConfig()
    found = []
    while len(found) < 3000:
        windows = sample_windows(rng, sample_plan(rng, config).events, config.seconds)
        found += windows or []
    windows = np.array(found)
    best = max(
        (_iou(start, start + length, windows) >= 0.5).mean()
        for start in np.arange(0, config.seconds, 0.5)
        for length in np.arange(1.5, 8, 0.5)
    )
    assert best <= 0.20
    assert 2 <= np.diff(windows).mean() <= 3


def test_windows_lie_on_half_seconds():
    rng = np.random.default_rng(1)
    config = WorldConfig(seconds=24, density=2.5)
    for _ in range(100):
        for start, end in sample_windows(rng, sample_plan(rng, config).events, 24) or []:
            assert 0 <= start < end <= 24
            assert (2 * start).is_integer() and (2 * end).is_integer()
