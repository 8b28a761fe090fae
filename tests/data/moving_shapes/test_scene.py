"""Scenes: what the labels say is what the states and masks show."""

import dataclasses

import numpy as np
import pytest
from observer import observed, planned

from tpo_jax.data.moving_shapes import WorldConfig, render, simulate, simulate_image
from tpo_jax.data.moving_shapes.world import EXTENT, GROWTH

CONFIG = WorldConfig()
SEEDS = [(7, 0, 0, i) for i in range(40)]
# A blink may end on its dark half, and the last frame of a video is 1/8 s before its end.
LATE = {"blinks": 0.4}


@pytest.fixture(scope="module")
def scenes():
    return [simulate(seed, CONFIG) for seed in SEEDS]


@pytest.fixture(scope="module")
def rendered(scenes):
    return [render(scene) for scene in scenes]


def test_events_are_seen_in_states_and_masks(scenes, rendered):
    for scene, pictures in zip(scenes, rendered, strict=True):
        seen, told = observed(scene, pictures.visible), planned(scene)
        assert [text for _, _, text in seen] == [text for _, _, text in told], scene.seed
        for (start, end, text), (true_start, true_end, _) in zip(seen, told, strict=True):
            assert start == true_start, (scene.seed, text)
            late = LATE.get(text.split()[3], 1 / CONFIG.fps)
            assert true_end - late <= end <= true_end, (scene.seed, text)


def test_every_action_occurs(scenes):
    actions = {event.action for scene in scenes for event in scene.events}
    assert actions == {"move", "turn", "grow", "blink", "hit", "enter", "leave", "hide"}


def test_events_follow_each_other_inside_the_video(scenes):
    for scene in scenes:
        assert len(scene.events) >= 2
        ends = [0.0, *(event.end for event in scene.events)]
        for event, before in zip(scene.events, ends, strict=False):
            assert event.start >= before + (0.5 if before else 0)
            assert 1.5 <= event.end - event.start <= 4
        assert ends[-1] <= CONFIG.seconds


def test_shapes_are_large_and_events_salient(scenes):
    for scene in scenes:
        for event in scene.events:
            i = event.actor
            begin, end = int(event.start * CONFIG.fps), int(event.end * CONFIG.fps) - 1
            x, y = scene.states.x[i], scene.states.y[i]
            if event.action == "move":
                assert np.hypot(x[end] - x[begin], y[end] - y[begin]) >= 15
            if event.action == "grow":
                radius = scene.states.radius[i]
                assert radius[-1] / radius[0] == pytest.approx(GROWTH, rel=1e-3)
            if event.action == "turn":
                angle = scene.states.angle[i]
                assert abs(angle[-1] - angle[begin]) >= 90
        assert (scene.states.radius >= 6).all()


def test_shapes_meet_only_when_they_hit_or_hide(scenes):
    for scene in scenes:
        states = scene.states
        reach = [states.radius[a.index] * EXTENT[a.form] for a in scene.actors]
        times = np.arange(CONFIG.num_frames) / CONFIG.fps
        for a in scene.actors:
            for b in scene.actors[: a.index]:
                meeting = np.zeros(CONFIG.num_frames, bool)
                for event in scene.events:
                    if {event.actor, event.other} == {a.index, b.index}:
                        meeting |= (times >= event.start) & (times < event.end)
                i, j = a.index, b.index
                far = np.hypot(states.x[i] - states.x[j], states.y[i] - states.y[j])
                assert (far + 1e-3 >= reach[i] + reach[j])[~meeting].all(), scene.seed


def test_theme_counts_its_events(scenes):
    for scene in scenes:
        theme = scene.theme
        doers = [e.actor for e in scene.events if e.action == theme.action]
        if theme.scope == "times":
            assert doers.count(theme.actor) == theme.count
        else:
            assert len(set(doers)) == theme.count


def test_actors_are_unique(scenes):
    for scene in scenes:
        assert len({actor.name for actor in scene.actors}) == len(scene.actors)
        assert 2 <= len(scene.actors) <= 4


def test_same_seed_same_scene_other_seed_other_scene():
    first, again, other = (simulate((3, 1, 0, i), CONFIG) for i in (5, 5, 6))
    assert first.events == again.events and first.actors == again.actors
    np.testing.assert_array_equal(render(first).frames, render(again).frames)
    assert first.events != other.events


def test_size_and_length_are_free():
    config = WorldConfig(size=96, fps=4, seconds=32, annotation_fps=2)
    scene = simulate((0, 0, 0, 0), config)
    pictures = render(scene)
    assert pictures.frames.shape == (128, 96, 96, 3)
    assert len(scene.events) >= 4 and scene.events[-1].end <= 32
    assert (scene.states.radius >= 9).all()


def test_images_have_one_to_four_shapes():
    counts = np.bincount([len(simulate_image((0, 0, 1, i), CONFIG).actors) for i in range(200)])
    assert len(counts) == 5 and counts[1:].min() >= 30
    scene = simulate_image((0, 0, 1, 3), CONFIG)
    assert render(scene).frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "change", [{"size": 63}, {"fps": 0}, {"annotation_fps": 3}, {"density": 9.0}, {"seconds": 2}]
)
def test_impossible_worlds_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"WorldConfig.{name}"):
        dataclasses.replace(CONFIG, **change)
