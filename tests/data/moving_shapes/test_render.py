"""Pixels and masks."""

import dataclasses

import numpy as np
import pytest

from tpo_jax.data.moving_shapes import WorldConfig, render, simulate
from tpo_jax.data.moving_shapes.render import coverage
from tpo_jax.data.moving_shapes.world import COLOURS, FORMS

CONFIG = WorldConfig(noise=0.0)


@pytest.fixture(scope="module")
def pairs():
    scenes = [simulate((11, 0, 0, i), CONFIG) for i in range(12)]
    return [(scene, render(scene)) for scene in scenes]


def _centre(mask):
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5, rows.mean() + 0.5


def test_masks_follow_the_states(pairs):
    for scene, pictures in pairs:
        hidden = {e.actor for e in scene.events if e.action in ("hide", "hit", "enter", "leave")}
        hidden |= {e.other for e in scene.events}
        for actor in scene.actors:
            if actor.index in hidden:
                continue
            for frame in range(0, CONFIG.num_frames, 9):
                x, y = _centre(pictures.visible[actor.index, frame])
                assert abs(x - scene.states.x[actor.index, frame]) < 1
                assert abs(y - scene.states.y[actor.index, frame]) < 1


def test_masks_have_the_colour_of_their_actor(pairs):
    for scene, pictures in pairs:
        for actor in scene.actors:
            frame = 40
            mask = pictures.visible[actor.index, frame]
            if mask.sum() < 30:
                continue
            white = scene.states.white[actor.index, frame]
            expected = (255, 255, 255) if white else COLOURS[actor.colour]
            assert np.abs(np.median(pictures.frames[frame][mask], axis=0) - expected).max() <= 2


def test_a_pixel_belongs_to_one_actor_at_most(pairs):
    for _, pictures in pairs:
        assert pictures.visible.sum(axis=0).max() <= 1


def test_who_hides_is_out_of_sight_in_the_middle():
    seen = 0
    for index in range(60):
        scene = simulate((12, 0, 0, index), CONFIG)
        for event in scene.events:
            if event.action == "hide":
                visible = render(scene).visible[event.actor]
                middle = int((event.start + event.end) / 2 * CONFIG.fps)
                assert not visible[middle].any(), scene.seed
                before, after = int(event.start * CONFIG.fps), int(event.end * CONFIG.fps) - 1
                assert visible[before].any() and visible[after].any()
                seen += 1
    assert seen >= 3


def test_the_background_is_dark_and_smooth(pairs):
    for _, pictures in pairs:
        empty = ~pictures.visible[:, 0].any(axis=0)
        values = pictures.frames[0][empty].astype(float)
        assert values.max() < 200 and np.median(values) < 100


def test_noise_is_light_and_only_noise():
    quiet = simulate((1, 0, 0, 0), CONFIG)
    loud = dataclasses.replace(quiet, config=dataclasses.replace(CONFIG, noise=1.0))
    difference = render(loud).frames.astype(int) - render(quiet).frames
    assert 0.5 < difference.std() < 1.5


@pytest.mark.parametrize("form", FORMS)
def test_forms_have_different_areas_and_turn_about_their_centre(form):
    size = slice(0, 64)
    arrays = [np.array([v, v]) for v in (32.0, 32.0, 9.0)]
    alpha = coverage(form, *arrays, np.array([0.0, 37.0]), size, size)
    areas = alpha.sum(axis=(1, 2))
    assert areas[0] == pytest.approx(areas[1], rel=0.02)
    assert 0.3 * 81 < areas[0] / np.pi < 1.3 * 81
