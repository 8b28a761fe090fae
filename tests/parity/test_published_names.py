"""Our names of the original layouts, held to the converters that `transformers` publishes.

What a converter does to names are facts of the two layouts. They are applied to what we write for a
tiny model; `transformers` has to find every tensor of its own tiny model in it, and no other.
"""

import json

import numpy as np
import pytest

from tests.interop.families import configs
from tests.interop.families.published_folder import sized, write_published
from tests.parity.test_whole_families import IDS, load_whole
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.tensors import write_file

pytestmark = pytest.mark.parity
# In this order, each wherever it is found, also in what an earlier one made.
# huggingface/transformers 01080c6: models/llava_onevision/convert_llava_onevision_weights_to_hf.py
ONEVISION_NAMES = (
    ("model.vision_tower.", ""), ("model.mm_projector", "multi_modal_projector"),
    ("model", "model.model"), ("vision_model.model", "vision_model"),
    ("lm_head", "language_model.lm_head"), ("model.model", "language_model.model"),
    ("multi_modal_projector.0", "multi_modal_projector.linear_1"),
    ("multi_modal_projector.2", "multi_modal_projector.linear_2"),
    ("language_model.model.image_newline", "image_newline"),
)  # fmt: skip
# huggingface/transformers 1436322: models/video_llava/convert_video_llava_weights_to_hf.py, which
# leaves out what its class does not have: attention over time.
VIDEO_LLAVA_NAMES = (
    ("model.video_tower.video_tower", "video_tower"),
    ("model.image_tower.image_tower", "image_tower"),
    ("model.mm_projector", "multi_modal_projector"), ("model", "language_model.model"),
    ("lm_head", "language_model.lm_head"), ("video_tower", "video_tower.vision_model"),
    ("image_tower", "image_tower.vision_model"),
    ("multi_modal_projector.0", "multi_modal_projector.linear_1"),
    ("multi_modal_projector.2", "multi_modal_projector.linear_2"),
)  # fmt: skip
# The original's config.json, their config.json, names, and what their class does not have.
LAYOUTS = {
    "llava_qwen": (configs.LLAVA_VIDEO, configs.LLAVA_ONEVISION, ONEVISION_NAMES, ()),
    "video_llava_original": (
        configs.VIDEO_LLAVA_ORIGINAL, configs.VIDEO_LLAVA, VIDEO_LLAVA_NAMES,
        (".temporal_embedding", ".temporal_attn.", ".temporal_layer_norm1."),
    ),
}  # fmt: skip


def renamed(key, names):
    for old, new in names:
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_we_write_becomes_the_layout_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    original, data, names, absent = LAYOUTS[name]
    source, theirs = tmp_path / "source", tmp_path / "theirs"
    source.mkdir()
    theirs.mkdir()
    write_published(source, sized(original), np.float32)
    import_family(source, tmp_path / "model")
    export_family(tmp_path / "model", tmp_path / "out", source)
    ours = read_tensors(tmp_path / "out")
    converted = {renamed(key, names): tensor for key, tensor in ours.items()}
    assert len(converted) == len(ours)
    kept = {k: x for k, x in converted.items() if not any(part in k for part in absent)}
    assert (len(kept) < len(converted)) == bool(absent)
    write_file(theirs / "model.safetensors", kept, {"format": "pt"})
    (theirs / "config.json").write_text(json.dumps(sized(data) | IDS))
    model = load_whole(theirs)  # nothing missing, unexpected or of another shape
    state = model.state_dict()
    assert len(kept) == sum(not key.endswith(("position_ids", "inv_freq")) for key in state)
    name = "multi_modal_projector.linear_2.weight"
    np.testing.assert_array_equal(state[f"model.{name}"].numpy(), np.asarray(kept[name]))
