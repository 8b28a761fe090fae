import dataclasses

import pytest

from tpo_jax.models.towers.config import TowerConfig

CLIP = TowerConfig(
    kind="clip", image_size=336, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096,
    activation="quick_gelu", epsilon=1e-5, layer=-2, max_frames=128, resize="crop",
)  # fmt: skip


def test_the_layer_counts_hidden_states():
    assert CLIP.grid == 24 and CLIP.layers_run == 23
    for layer, run in ((-1, 24), (0, 0), (24, 24), (-25, 0)):
        assert dataclasses.replace(CLIP, layer=layer).layers_run == run


@pytest.mark.parametrize("field, value, message", [
    ("kind", "vit", "vision.kind='vit': use one of"),
    ("heads", 10, "vision.heads=10: must divide vision.width=1024"),
    ("activation", "relu", "vision.activation='relu': use one of"),
    ("layer", 25, "vision.layer=25: there are hidden states 0..24"),
    ("frames", 8, "vision.frames=8: kind='clip' has no positions in time"),
    ("resize", "tile", "vision.resize='tile': use one of"),
])  # fmt: skip
def test_a_wrong_value_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **{field: value})


def test_towers_with_time_name_their_frames():
    with pytest.raises(ValueError, match="vision.frames=0: umt needs the frames"):
        dataclasses.replace(CLIP, kind="umt")
    with pytest.raises(ValueError, match="vision.max_frames=128.*has 8 positions"):
        dataclasses.replace(CLIP, kind="languagebind", frames=8)
