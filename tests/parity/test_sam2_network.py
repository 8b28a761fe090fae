"""SAM 2 against `transformers`, on tiny random models: every part, and objects tracked through a
video, within 2e-4 in float32."""

import dataclasses
import functools
import json

import gcs_server
import jax
import jax.numpy as jnp
import memory_bucket
import numpy as np
import pytest
from fake_batches import small_params
from flax import nnx

from tests.parity.towers import difference, randomise, run, tensors_of, with_weights
from tpo_jax import convert
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.interop.export import largest_difference
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.folder import load_config, load_into, open_leaves, save_model
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.mapping import MappingError, export_leaves, import_leaves
from tpo_jax.interop.sam2 import (
    IGNORED,
    export_folder,
    import_folder,
    sam2_config,
    sam2_rows,
)
from tpo_jax.interop.sam2_model import add_to_model
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.heads.sam2.prompt_encoder import FILLING
from tpo_jax.models.heads.sam2.tracking import Prompt, track
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten, unflatten

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4
SIDE, GRID, WIDTH, FRAMES = 128, 8, 128, 6


def their_config():
    """Windows that do not divide their stage, global blocks in and behind a run of windows, fewer
    pointers and memories than frames. Their code has memories of width 64 only, and fails on a
    global block that pools."""
    from transformers import Sam2VideoConfig

    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [SIDE, SIDE],
        "window_positional_embedding_background_size": [5, 5], "blocks_per_stage": [2, 1, 4, 2],
        "embed_dim_per_stage": [16, 32, 48, 64], "num_attention_heads_per_stage": [1, 2, 2, 4],
        "window_size_per_stage": [8, 4, 6, 3], "global_attention_blocks": [5, 8],
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": backbone, "fpn_hidden_size": WIDTH,
        "backbone_channel_list": [64, 48, 32, 16],
        "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
    }  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": WIDTH, "mlp_dim": 96, "num_attention_heads": 4, "iou_head_hidden_dim": 72
        },
        image_size=SIDE, num_maskmem=4, max_object_pointers_in_encoder=4,
        memory_attention_hidden_size=WIDTH, memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=80, memory_attention_rope_feat_sizes=[GRID, GRID],
        memory_encoder_hidden_size=WIDTH, mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH, memory_fuser_intermediate_dim=56,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


@functools.cache
def pair():
    """Their model, and ours with its weights."""
    import torch
    from transformers import Sam2VideoModel

    theirs = randomise(Sam2VideoModel(their_config()))
    with torch.no_grad():
        # Biases that make some objects present and others absent, and masks neither full nor empty.
        theirs.mask_decoder.pred_obj_score_head.proj_out.weight.mul_(8.0)
    config = sam2_config(theirs.config.to_dict())
    tensors = tensors_of(theirs)
    ours = with_weights(functools.partial(Sam2, config), sam2_rows(config), tensors, IGNORED)
    return theirs, ours


def images(frames=FRAMES, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(frames, SIDE, SIDE, 3)).astype(np.float32)
    # Smooth, as pictures are; every frame another.
    return (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) / np.sqrt(3).astype(np.float32)


def as_torch(frames):
    import torch

    return torch.from_numpy(np.moveaxis(frames, -1, 1).copy())


def last(x):
    """Channels behind the cells."""
    return np.moveaxis(x.detach().numpy(), -3, -1)


def test_image_encoder_stage_by_stage():
    theirs, ours = pair()
    frames = images(2)
    backbone = theirs.vision_encoder.backbone(as_torch(frames))
    for stage, (found, expected) in enumerate(zip(
        run(ours.image_encoder.backbone, jnp.asarray(frames)),
        backbone.intermediate_hidden_states, strict=True,
    )):  # fmt: skip
        assert difference(found, expected) < TOLERANCE, stage
    features = run(ours, jnp.asarray(frames), method="features")
    expected = theirs.get_image_features(as_torch(frames), return_dict=True).fpn_hidden_states
    for found, flat in zip((features.fine, features.middle, features.top), expected, strict=True):
        flat = flat.permute(1, 0, 2).reshape(found.shape)
        assert difference(found, flat) < TOLERANCE


def test_prompt_encoder_points_boxes_and_masks():
    import torch

    theirs, ours = pair()
    rng = np.random.default_rng(1)
    points = rng.uniform(0, SIDE, (2, 3, 4, 2)).astype(np.float32)
    labels = np.array([0, 1, 1, FILLING], np.int32) * np.ones((2, 3, 1), np.int32)
    boxes = np.sort(rng.uniform(0, SIDE, (2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype(np.float32)
    masks = rng.normal(size=(2, 1, 4 * GRID, 4 * GRID)).astype(np.float32)
    encoder = theirs.prompt_encoder
    padded = np.concatenate([points, np.zeros_like(points[:, :, :1])], axis=2)
    padded_labels = np.concatenate([labels, np.full_like(labels[..., :1], FILLING)], axis=2)
    given = torch.from_numpy(points), torch.from_numpy(labels)
    expected, _ = encoder(*given, None, None)
    found = run(ours.prompt_encoder, padded, padded_labels, method="points")
    assert difference(found, expected) < TOLERANCE
    expected, dense = encoder(None, None, torch.from_numpy(boxes), torch.from_numpy(masks))
    assert difference(run(ours.prompt_encoder, boxes, method="boxes"), expected) < TOLERANCE
    found = run(ours.prompt_encoder, masks[:, 0], method="masks")
    assert difference(found, last(dense)) < TOLERANCE
    _, dense = encoder(None, None, torch.from_numpy(boxes), None)
    found = run(ours.prompt_encoder, None, method="masks")
    assert difference(np.broadcast_to(found, (2, *found.shape)), last(dense)) < TOLERANCE
    both = encoder(*given, torch.from_numpy(boxes), None)[0]
    found = jnp.concatenate(
        [run(ours.prompt_encoder, points, labels, method="points"),
         run(ours.prompt_encoder, boxes, method="boxes")], axis=2,
    )  # fmt: skip
    assert difference(found, both) < TOLERANCE


@pytest.mark.parametrize("with_mask", [False, True])
def test_mask_decoder_masks_iou_presence_and_tokens(with_mask):
    import torch

    theirs, ours = pair()
    rng = np.random.default_rng(2)
    B, S = 2, 3
    frames = jnp.asarray(images(B))
    features = run(ours, frames, method="features")
    prompt = rng.normal(size=(B, S, 3, WIDTH)).astype(np.float32)
    # Theirs has one mask prompt a frame, for all of its objects.
    mask = rng.normal(size=(B, 1, 4 * GRID, 4 * GRID)).astype(np.float32) if with_mask else None
    per_frame = jax.tree.map(lambda x: x[:, None], features)
    found = run(ours, per_frame.top, per_frame, prompt, mask, method="decode")

    def first(x):
        return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())

    dense = theirs.prompt_encoder(
        None, None, torch.zeros(B, S, 4), None if mask is None else torch.from_numpy(mask)
    )[1]
    position = theirs.get_image_wide_positional_embeddings().repeat(B, 1, 1, 1)
    common = {
        "image_embeddings": first(features.top), "image_positional_embeddings": position,
        "sparse_prompt_embeddings": torch.from_numpy(prompt), "dense_prompt_embeddings": dense,
        "high_resolution_features": [first(features.fine), first(features.middle)],
    }  # fmt: skip
    masks, iou, tokens, presence = theirs.mask_decoder(**common, multimask_output=True)
    assert difference(found.masks[:, :, 1:], masks) < TOLERANCE
    assert difference(found.iou[..., 1:], iou) < TOLERANCE
    assert difference(found.tokens[:, :, 1:], tokens) < TOLERANCE
    assert difference(found.presence[..., None], presence) < TOLERANCE


def session(theirs, frames, prompts):
    """Their session over a video with prompts {object: (frame, points, labels) or (frame, mask)}.

    Objects are alone in their session: theirs decides for all objects of a frame at once whether
    masks become binary in the memory.
    """
    import torch
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    state = Sam2VideoInferenceSession(
        video=as_torch(frames), video_height=SIDE, video_width=SIDE, dtype=torch.float32
    )
    index = state.obj_id_to_idx(1)
    frame, *given = prompts
    if len(given) == 2:
        points, labels = (torch.from_numpy(np.asarray(x)[None, None]) for x in given)
        state.add_point_inputs(
            index, frame, {"point_coords": points.float(), "point_labels": labels.int()}
        )
    else:
        state.add_mask_inputs(index, frame, torch.from_numpy(given[0][None, None]))
    state.obj_with_new_inputs = [1]
    return state


def propagated(theirs, frames, prompt, reverse=False):
    """{frame: (mask, presence)}, from the prompted frame on, or back from it."""
    import torch

    state, found = session(theirs, frames, prompt), {}
    with torch.no_grad():
        for output in theirs.propagate_in_video_iterator(
            state, start_frame_idx=prompt[0], reverse=reverse
        ):
            found[output.frame_idx] = (
                output.pred_masks[0, 0].numpy(), float(output.object_score_logits[0, 0])
            )  # fmt: skip
    return found


def check_video(tracked, theirs, frames, number, prompt):
    """Every frame of one object: masks where theirs is present, presence, and which it is."""
    start = prompt[0]
    expected = propagated(theirs, frames, prompt)
    if start:
        expected |= propagated(theirs, frames, prompt, reverse=True)
    assert sorted(expected) == list(range(len(frames)))
    states = []
    for frame, (mask, presence) in expected.items():
        found = float(tracked.presence[0, number, frame])
        assert abs(found - presence) < TOLERANCE, (frame, found, presence)
        if presence > 0:
            difference_here = difference(tracked.masks[0, number, frame], mask)
            assert difference_here < TOLERANCE, (frame, difference_here)
        else:
            assert np.all(mask == -1024.0)
        states.append(presence > 0)
    return states


def tracked_by_us(ours, frames, tokens, starts, single, masks=None):
    prompt = Prompt(
        tokens,
        jnp.asarray([starts], jnp.int32),
        jnp.asarray([single]),
        None if masks is None else jnp.asarray(masks[None]),
    )
    structure, state = nnx.split(ours)

    def call(state, frames, prompt):
        sam = nnx.merge(structure, state)
        return track(
            sam, lambda frame: sam.features(frames[frame]), prompt, len(frames), len(frames)
        )

    return jax.jit(call)(state, jnp.asarray(frames), prompt)


def test_several_objects_through_a_video_from_boxes_and_points():
    """Two boxes and one box that comes late, then one point each: more frames than memories."""
    theirs, ours = pair()
    frames = images()
    boxes = np.array([[10, 20, 60, 70], [50, 40, 120, 100], [5, 5, 90, 50]], np.float32)
    starts = (0, 0, 3)
    tokens = run(ours.prompt_encoder, boxes[None], method="boxes")
    tracked = tracked_by_us(ours, frames, tokens, starts, [True] * 3)
    states = []
    for number, (start, box) in enumerate(zip(starts, boxes, strict=True)):
        prompt = (start, box.reshape(2, 2), np.array([2, 3]))
        states += check_video(tracked, theirs, frames, number, prompt)
    points = np.array([[[30, 40], [0, 0]], [[100, 90], [0, 0]]], np.float32)
    labels = np.array([[1, FILLING]] * 2, np.int32)
    tokens = run(ours.prompt_encoder, points[None], labels[None], method="points")
    starts = (0, 5)
    tracked = tracked_by_us(ours, frames, tokens, starts, [False] * 2)
    for number, start in enumerate(starts):
        prompt = (start, points[number, :1], labels[number, :1])
        states += check_video(tracked, theirs, frames, number, prompt)
    # Both paths of an absent object were compared.
    assert any(states) and not all(states)


def test_a_mask_is_tracked_from_the_frame_that_it_is_given_for():
    theirs, ours = pair()
    frames = images(4, seed=1)
    masks = np.zeros((1, SIDE, SIDE), np.float32)
    masks[0, 20:80, 30:100] = 1.0
    tokens = jnp.zeros((1, 1, 2, WIDTH))
    tracked = tracked_by_us(ours, frames, tokens, (1,), [False], masks)
    check_video(tracked, theirs, frames, 0, (1, masks[0]))


def test_weights_go_in_and_out_bit_for_bit():
    theirs, ours = pair()
    tensors = tensors_of(theirs)
    rows = sam2_rows(ours.config)
    leaves = import_leaves(rows, tensors, IGNORED)
    back = export_leaves(rows, leaves)
    assert sorted(back) == sorted(set(tensors) - set(IGNORED))
    for key, tensor in back.items():
        assert tensor.dtype == tensors[key].dtype and tensor.shape == tensors[key].shape, key
        assert tensor.tobytes() == np.ascontiguousarray(tensors[key]).tobytes(), key
    with pytest.raises(MappingError, match=r"no row uses.*memory_attention\.extra"):
        import_leaves(rows, tensors | {"memory_attention.extra": np.zeros(1)}, IGNORED)
    del tensors["vision_encoder.backbone.blocks.4.attn.qkv.weight"]
    with pytest.raises(MappingError, match=r"blocks\.4\.attn\.qkv\.weight"):
        import_leaves(rows, tensors, IGNORED)


def test_a_folder_of_transformers_is_imported_and_exported(tmp_path, monkeypatch):
    from transformers import Sam2VideoModel

    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "published")
    config, leaves = import_folder(tmp_path / "published")
    assert config == ours.config
    (tmp_path / "out").mkdir()
    export_folder(tmp_path / "out", config, leaves)
    theirs.config.save_pretrained(tmp_path / "out")
    again = Sam2VideoModel.from_pretrained(tmp_path / "out")
    tensors = tensors_of(theirs)
    for key, tensor in tensors_of(again).items():
        assert key in IGNORED or np.array_equal(tensor, tensors[key]), key
    codec = TextCodec(train_tokenizer(["a red square moves"], 300))
    save_model(tmp_path / "model", preset("micro"), {"scale": np.ones(3, np.float32)}, codec)
    lines = add_to_model(tmp_path / "published", tmp_path / "model", tmp_path / "both")
    assert lines[1:] == [
        'train with model.preset="", model.heads=["sam2"] and init_missing=["heads/sam2/adapter", '
        '"heads/sam2/box_readout", "task_tokens/mask", "box_encoder"]'
    ]
    assert load_config(tmp_path / "both") == dataclasses.replace(preset("micro"), sam2=config)
    have = open_leaves(tmp_path / "both")
    assert have.keys() == {"scale", *(f"heads/sam2/network/{name}" for name in leaves)}
    memory_bucket.install(monkeypatch)
    for name in ("published", "model"):
        gcs_server.put(tmp_path / name, f"gs://bucket/{name}")
    add_to_model("gs://bucket/published", "gs://bucket/model", "gs://bucket/both")
    assert largest_difference(tmp_path / "both", "gs://bucket/both") == 0.0
    file = tmp_path / "published" / "config.json"
    about = json.loads(file.read_text())
    about["mask_decoder_config"]["num_multimask_outputs"] = 4
    file.write_text(json.dumps(about))
    with pytest.raises(FamilyError, match="num_multimask_outputs=4"):
        import_folder(tmp_path / "published")


def test_a_model_with_a_sam2_goes_out_by_parts_and_comes_back(tmp_path, capsys):
    """Its light mask head makes room; what it had beside that head stays its own."""
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "published")
    codec = TextCodec(train_tokenizer(["a red square moves"], 300))
    add_task_tokens(codec.tokenizer, ("mask",))
    codec = TextCodec(codec.tokenizer)
    capsys.readouterr()  # what `transformers` said of its own
    light = preset("micro", ("mask",), codec.task_tokens)
    save_model(tmp_path / "light", light, small_params(FunctionalModel(light).abstract()), codec)

    def convert_main(command, *names):
        flags = [f"--{flag}={tmp_path / name}" for flag, name in names]
        status = convert.main([command, *flags])
        said = capsys.readouterr()
        return status, said.out + said.err

    status, said = convert_main(
        "import", ("source", "published"), ("into", "light"), ("out", "start"))  # fmt: skip
    assert status == 0 and "left out: head mask, whose task sam2 answers" in said
    assert said.endswith('init_missing=["heads/sam2/adapter", "heads/sam2/box_readout"]\n')
    config = dataclasses.replace(light, heads=("sam2",), sam2=ours.config)
    abstract = FunctionalModel(config).abstract()
    loaded = load_into(abstract, tmp_path / "start", init_missing=["heads/sam2/(?!network)"])
    drawn = flatten(small_params(abstract))
    params = {name: loaded.leaves.get(name, drawn[name]) for name in drawn}
    save_model(tmp_path / "tuned", config, unflatten(params), codec)

    status, said = convert_main("export", ("model", "tuned"), ("out", "exported"))
    assert status == 2 and "give the folder of SAM 2 that its network came from with --like" in said
    status, said = convert_main(
        "export", ("model", "light"), ("out", "exported"), ("like", "published"))  # fmt: skip
    assert status == 2 and "without sam2" in said
    assert not (tmp_path / "exported").exists()
    status, _ = convert_main(
        "export", ("model", "tuned"), ("out", "exported"), ("like", "published"))  # fmt: skip
    assert status == 0
    for file in (tmp_path / "published").iterdir():
        there = tmp_path / "exported" / "sam2" / file.name
        if file.suffix == ".json":
            assert there.read_bytes() == file.read_bytes()
    tensors, again = (read_tensors(tmp_path / name) for name in ("published", "exported/sam2"))
    assert tensors.keys() == again.keys()
    for name in tensors:
        assert np.asarray(tensors[name]).tobytes() == np.asarray(again[name]).tobytes(), name
    assert convert_main("import", ("source", "exported"), ("out", "back"))[0] == 0
    assert largest_difference(tmp_path / "tuned", tmp_path / "back") == 0.0
    assert load_config(tmp_path / "back") == config
