"""`Sam2Model` of `transformers`, SAM 2 without its memory: masks of single frames within 2e-4 in
float32, and which leaves are left to training."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_batches import small_params
from flax import nnx

from tests.parity.test_sam2_network import (
    TOLERANCE,
    as_torch,
    images,
    pair,
    their_config,
)
from tests.parity.towers import difference, randomise, run, tensors_of
from tpo_jax import convert
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.folder import ModelFolderError, load_into, save_model
from tpo_jax.interop.mapping import MappingError, export_leaves, import_leaves
from tpo_jax.interop.sam2 import (
    IGNORED,
    PREFIX,
    image_rows,
    import_folder,
    import_network,
    memory_rows,
    sam2_rows,
)
from tpo_jax.models.heads.sam2.mask_decoder import choose, pick
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.heads.sam2.prompt_encoder import FILLING
from tpo_jax.models.heads.sam2.tracking import stills
from tpo_jax.models.layers import Rngs
from tpo_jax.models.presets import preset
from tpo_jax.models.sam2_config import PUBLISHED
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten, unflatten
from tpo_jax.training.optimizer import assign_groups

pytestmark = pytest.mark.parity
MEMORY = {
    "memory_attention", "memory_encoder", "memory_times", "no_pointer", "mask_downsample",
    "pointer_mlp", "pointer_time", "occlusion",
}  # fmt: skip
FRAMES = 3


@functools.cache
def theirs():
    from transformers import Sam2Config, Sam2Model

    about = their_config().to_dict()
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    config = Sam2Config(**{part: about[part] for part in parts})
    config._attn_implementation = "eager"
    return randomise(Sam2Model(config))


@pytest.fixture
def published(tmp_path):
    theirs().save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def by_themselves(ours, frames, tokens):
    """Masks [F, S, 4, m, m] and so on of every frame as if it were the prompted one."""
    structure, state = nnx.split(ours)

    def call(state, frames, tokens):
        sam = nnx.merge(structure, state)
        return stills(sam, lambda frame: sam.features(frames[frame[:, :1]]), tokens, len(frames))

    decoded = jax.jit(call)(state, jnp.asarray(frames), tokens)
    return jax.tree.map(lambda x: x[0].swapaxes(0, 1), decoded)


def test_masks_of_single_frames(published):
    """Boxes, whose first mask answers unless it is unstable, and points with three masks."""
    import torch

    config, leaves, _ = import_network(published)
    structure, state = nnx.split(nnx.eval_shape(lambda: Sam2(config, rngs=Rngs(0))))
    abstract = nnx.to_pure_dict(state)
    drawn = flatten(small_params(abstract))  # the memory, which single frames do not read
    for path, leaf in leaves.items():
        assert leaf.shape == drawn[path].shape, path
    params = {path: nnx.Param(jnp.asarray(np.asarray(leaves.get(path, drawn[path]))))
              for path in drawn}  # fmt: skip
    ours = nnx.merge(structure, nnx.State(unflatten(params)))
    frames = images(FRAMES)
    boxes = np.array([[10, 20, 60, 70], [50, 40, 120, 100]], np.float32)
    points = np.array([[[30, 40]], [[100, 90]]], np.float32)
    by_box = run(ours.prompt_encoder, boxes[None], method="boxes")
    padded = np.concatenate([points, np.zeros_like(points)], axis=1)
    labels = np.array([[1, FILLING]] * 2, np.int32)
    by_point = run(ours.prompt_encoder, padded[None], labels[None], method="points")
    every = {"pixel_values": as_torch(frames)}
    with torch.no_grad():
        given = torch.from_numpy(boxes).repeat(FRAMES, 1, 1)
        boxed = theirs()(**every, input_boxes=given, multimask_output=False)
        given = torch.from_numpy(points).repeat(FRAMES, 1, 1, 1)
        pointed = theirs()(**every, input_points=given)
    found = by_themselves(ours, frames, by_box)
    answer, _ = choose(found, True)
    assert difference(pick(found.masks, answer)[:, :, None], boxed.pred_masks) < TOLERANCE
    assert difference(found.presence[..., None], boxed.object_score_logits) < TOLERANCE
    found = by_themselves(ours, frames, by_point)
    assert difference(found.masks[:, :, 1:], pointed.pred_masks) < TOLERANCE
    assert difference(found.iou[:, :, 1:], pointed.iou_scores) < TOLERANCE


def test_what_it_lacks_is_what_the_video_model_has_beyond_it(published):
    video, config = tensors_of(pair()[0]), pair()[1].config
    leaves = import_leaves(sam2_rows(config), video, IGNORED)
    memory = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in MEMORY}
    beyond = video.keys() - tensors_of(theirs()).keys() - set(IGNORED)
    assert export_leaves(memory_rows(config, ""), memory).keys() == beyond
    found, leaves, missing = import_network(published)
    assert set(missing) == MEMORY and len(missing) == len(MEMORY)
    wanted = flatten(nnx.to_pure_dict(nnx.state(
        nnx.eval_shape(lambda: Sam2(found, rngs=Rngs(0))))))  # fmt: skip
    assert {path.split("/")[0] for path in wanted.keys() - leaves.keys()} == MEMORY
    tensors = tensors_of(theirs())
    back = export_leaves(image_rows(found, ""), leaves)
    assert back.keys() == tensors.keys()
    for key, tensor in back.items():
        assert np.asarray(tensor).tobytes() == np.ascontiguousarray(tensors[key]).tobytes(), key
    # Of the memory that is left to training, the sizes are the published ones, all alike.
    for size in PUBLISHED.values():
        assert dataclasses.replace(
            found, **{name: getattr(size, name) for name in (
                "memory_width", "memory_layers", "memory_mlp_width", "fuser_layers",
                "fuser_mlp_width", "memories", "pointers", "pointer_times", "occlusion_embedding",
            )}) == found  # fmt: skip
    with pytest.raises(MappingError, match="no_object_pointer"):
        import_leaves(image_rows(found, ""), tensors | {"no_object_pointer": np.zeros((1, 128))})


def test_training_starts_from_what_import_says_and_nothing_else_takes_the_folder(
    published, tmp_path, capsys
):
    codec = TextCodec(train_tokenizer(["a red square moves"], 300))
    add_task_tokens(codec.tokenizer, ("mask",))
    codec = TextCodec(codec.tokenizer)
    capsys.readouterr()  # what `transformers` said of its own
    light = preset("micro", ("mask",), codec.task_tokens)
    save_model(tmp_path / "light", light, small_params(FunctionalModel(light).abstract()), codec)
    into = [f"--source={published}", f"--into={tmp_path / 'light'}", f"--out={tmp_path / 'start'}"]
    assert convert.main(["import", *into]) == 0
    said = capsys.readouterr().out
    assert "this model cannot track" in said
    assert f"not there: {', '.join(import_network(published)[2])}: {published} is of" in said
    missing = json.loads(said.strip().rsplit("init_missing=")[1])
    adapter = ["heads/sam2/adapter", "heads/sam2/box_readout"]
    assert missing[:2] == adapter and set(missing[2:]) == {PREFIX + part for part in MEMORY}

    config = dataclasses.replace(light, heads=("sam2",), sam2=import_network(published)[0])
    abstract = FunctionalModel(config).abstract()
    loaded = load_into(abstract, tmp_path / "start", init_missing=missing)
    assert {path for path in loaded.missing if path.startswith(PREFIX)} == {
        path for path in flatten(abstract)
        if path.startswith(PREFIX) and path.removeprefix(PREFIX).split("/")[0] in MEMORY
    }  # fmt: skip
    with pytest.raises(ModelFolderError, match=r"network/memory_attention/.*not in the folder"):
        load_into(abstract, tmp_path / "start", init_missing=adapter)

    # docs/heads.md: all of the memory but what only reads a given mask.
    groups = [[f"{PREFIX}(memory_|pointer_|no_pointer|occlusion)", 1e-4]]
    trained = assign_groups(groups, list(flatten(abstract)))
    trained = {path.removeprefix(PREFIX).split("/")[0] for path in trained}
    assert trained == MEMORY - {"mask_downsample"}

    drawn = flatten(small_params(abstract))
    whole = unflatten({name: loaded.leaves.get(name, drawn[name]) for name in drawn})
    save_model(tmp_path / "tuned", config, whole, codec)
    out = [f"--model={tmp_path / 'tuned'}", f"--out={tmp_path / 'out'}", f"--like={published}"]
    assert convert.main(["export", *out]) == 2
    assert "give a folder that `Sam2VideoModel` saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    about = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(about | {"model_type": "sam"}))
    with pytest.raises(FamilyError, match="model_type='sam': expected 'sam2_video', or 'sam2'"):
        import_folder(published)
