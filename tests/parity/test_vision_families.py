"""Whole multimodal models against `transformers`: logits of text with images and videos.

A tiny random model is saved by `transformers`; our side reads config.json and the safetensors file.
"""

import copy
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.interop.families.configs import LLAVA_ONEVISION, LLAVA_VIDEO, VIDEO_LLAVA
from tests.parity.towers import difference, randomise
from tpo_jax.interop.families.registry import family_of, from_leaves, to_leaves
from tpo_jax.models.connectors.tiling import tiling_of
from tpo_jax.models.towers.registry import normalise_pixels
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import unflatten

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4
IMAGE_ID, VIDEO_ID = 198, 199


class Pair:
    """Their model and ours, from the folder that theirs wrote."""

    def __init__(self, model_class, config_class, data, folder):
        config = config_class(
            **{k: v for k, v in data.items() if k != "model_type"}, image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID, attn_implementation="eager",
        )  # fmt: skip
        self.theirs = randomise(model_class(config))
        self.theirs.save_pretrained(folder)
        self.data = json.loads((folder / "config.json").read_text())
        self.tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        self.family = family_of(self.data)
        self.config = self.family.model_config(self.data, {})
        self.leaves, self.carried = to_leaves(self.family, self.config, self.tensors)
        self.params = unflatten(jax.tree.map(jnp.asarray, self.leaves))
        self.model = FunctionalModel(self.config)

    def pixels(self, frames):
        """uint8[..., S, S, 3] as their normalised [..., 3, S, S]."""
        import torch

        pixels = np.asarray(normalise_pixels(self.config.vision, jnp.asarray(frames)))
        return torch.from_numpy(np.moveaxis(pixels, -1, -3).copy())

    def call(self, function, *inputs):
        """function(our model, *inputs) as one compiled program."""

        def run(params, *inputs):
            return function(self.model.bind(params), *inputs)

        return jax.jit(run)(self.params, *inputs)

    def encode(self, frames):
        """uint8[B, F, S, S, 3] -> float[B, V, D]."""
        valid, times = np.ones(frames.shape[:2], bool), np.zeros(frames.shape[:2], np.float32)
        return self.call(lambda m, *x: m.encode(*x).visual, frames, valid, times)

    def tiled(self, tiles, size, room=4):
        """float[1, V, D] of an image of `size` in tiles uint8[1 + n, S, S, 3], the whole first, in
        the arrays of a bucket of `room` tiles."""
        tiling = tiling_of(self.config)
        index, weight = tiling.tokens(size, room)
        spare = ((0, 0), (0, tiling.num_tokens(room) - len(index)), (0, 0))
        missing = np.zeros((room + 1 - len(tiles), *tiles.shape[1:]), np.uint8)
        batch = {
            "frames": tiles[None, :1], "frame_valid": np.ones((1, 1), bool),
            "tiles": np.concatenate([tiles[1:], missing])[None],
            "tile_index": np.pad(index[None], spare), "tile_weight": np.pad(weight[None], spare),
        }  # fmt: skip
        return self.call(lambda m, b: m.encode_batch(b).visual, batch)[:, : len(index)]

    def logits(self, ids, visual, segments):
        """Logits float[B, P, V] of ids int[B, P] whose marked places hold `visual`, row by row."""
        ids, segments = np.asarray(ids), np.asarray(segments)
        positions = np.where(segments, np.cumsum(segments, axis=1) - 1, 0)

        def run(model, ids, segments, positions, visual):
            embeds = model.embed_tokens(ids)
            rows = []
            for row, tokens in enumerate(visual):
                (places,) = np.nonzero(np.asarray(ids_static[row]) >= IMAGE_ID)
                rows.append(embeds[row].at[places].set(tokens))
            hidden, _ = model.language.prefill(jnp.stack(rows), positions, segments)
            return hidden @ model.language.table.T

        ids_static = ids
        found = self.call(run, ids, segments, positions, visual)
        return np.asarray(found)[..., : self.config.language.num_tokens]


def _ids(rng, before, tokens, marker, after):
    text = rng.integers(5, 190, before + after).tolist()
    return text[:before] + [marker] * tokens + text[before:]


def _padded(rows, side):
    """ids and mask [B, P] of rows of unequal length."""
    length = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), length), np.int64)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


def _frames(rng, *shape, size=24):
    return rng.integers(0, 256, (*shape, size, size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    folder = tmp_path_factory.mktemp("onevision")
    return Pair(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, LLAVA_ONEVISION, folder
    )


@pytest.fixture(scope="module")
def video_llava(tmp_path_factory):
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("video_llava")
    return Pair(VideoLlavaForConditionalGeneration, VideoLlavaConfig, VIDEO_LLAVA, folder)


@pytest.mark.parametrize("name", ["onevision", "video_llava"])
def test_what_goes_back_out_is_the_file(name, request):
    pair = request.getfixturevalue(name)
    assert pair.carried == {}
    out = from_leaves(pair.family, pair.config, pair.leaves, {}, pair.tensors.keys())
    assert out.keys() == pair.tensors.keys()
    for key, tensor in pair.tensors.items():
        np.testing.assert_array_equal(out[key], tensor)


@pytest.mark.parametrize("size, side", [((20, 50), "left"), ((44, 40), "right")])
def test_onevision_image_of_any_resolution_and_video_in_one_batch(onevision, size, side):
    """Row 0: an image in tiles, row 1: a video of three frames; one of them is padded."""
    import torch

    rng = np.random.default_rng(size[0])
    # 20 x 50 fits 24 x 48 best, 44 x 40 fits 48 x 48: 2 and 4 tiles after the whole image.
    tiles = _frames(rng, 3 if size[0] == 20 else 5)
    image = onevision.tiled(tiles, size)
    clip = _frames(rng, 1, 3)
    video = onevision.encode(clip)
    assert video.shape[1] == 3 * 4 + 1 == onevision.config.num_visual_tokens(3)
    rows = [
        _ids(rng, 3, image.shape[1], IMAGE_ID, 5), _ids(rng, 2, video.shape[1], VIDEO_ID, 4)
    ]  # fmt: skip
    ids, mask = _padded(rows, side)
    assert not mask.all()
    expected = onevision.theirs(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
        pixel_values=onevision.pixels(tiles[None]), image_sizes=torch.tensor([size]),
        pixel_values_videos=onevision.pixels(clip),
    ).logits  # fmt: skip
    found = onevision.logits(ids, [image[0], video[0]], mask)
    seen = mask.astype(bool)
    assert difference(found[seen], expected[torch.from_numpy(seen)]) < TOLERANCE


def test_onevision_single_view_and_videos_of_other_lengths(onevision):
    """An image without tiles (as in multi-image prompts), and clips of two and five frames."""
    import torch

    rng = np.random.default_rng(7)
    images, clips = _frames(rng, 2), [_frames(rng, 1, 2), _frames(rng, 1, 5)]
    visual = onevision.encode(images[:, None])
    assert visual.shape[1] == 9 + 1
    row = _ids(rng, 2, 20, IMAGE_ID, 3)
    expected = onevision.theirs(
        input_ids=torch.tensor([row]), pixel_values=onevision.pixels(images[:, None]),
        image_sizes=torch.tensor([[24, 24]] * 2), batch_num_images=torch.tensor([2]),
    ).logits  # fmt: skip
    found = onevision.logits([row], [visual.reshape(20, -1)], [[1] * len(row)])
    assert difference(found, expected) < TOLERANCE
    for clip in clips:
        visual = onevision.encode(clip)
        row = _ids(rng, 2, visual.shape[1], VIDEO_ID, 3)
        expected = onevision.theirs(
            input_ids=torch.tensor([row]), pixel_values_videos=onevision.pixels(clip)
        ).logits
        found = onevision.logits([row], [visual[0]], [[1] * len(row)])
        assert difference(found, expected) < TOLERANCE


def test_plain_anyres_packs_every_patch_as_llava_next_does():
    """A grid of more patches than "anyres_max_9" lets pass is not resized."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    data = LLAVA_VIDEO | {
        "image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(4x4)"
    }  # fmt: skip
    config = family_of(data).model_config(data, {})
    tiling, rng, lengths = tiling_of(config), np.random.default_rng(5), []
    sizes = types.SimpleNamespace(image_size=24, patch_size=8)
    about = types.SimpleNamespace(
        vision_config=sizes, image_grid_pinpoints=[list(x) for x in config.connector.resolutions]
    )
    for size in ((20, 50), (96, 90), (31, 95)):
        index, weight = tiling.tokens(size, 16)
        patches = rng.normal(size=(17, 9, 4)).astype(np.float32)  # the whole, and room for 16
        newline = rng.normal(size=4).astype(np.float32)
        flat = np.concatenate([patches.reshape(-1, 4), newline[None]])
        (expected,), _ = LlavaNextModel.pack_image_features(
            types.SimpleNamespace(config=about),
            [torch.from_numpy(patches[: 1 + tiling.tiles(size)])], torch.tensor([size]), "full",
            torch.from_numpy(newline),
        )  # fmt: skip
        found = np.einsum("nk,nkd->nd", weight, flat[index])
        assert difference(found, expected) < 1e-6
        lengths.append(len(found))
    # 12 x 12 patches, and a newline after every row.
    assert lengths[1] == 9 + 12 * 13 and max(lengths) <= tiling.num_tokens(16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_video_llava_image_and_video_in_one_batch(video_llava, side):
    import torch

    rng = np.random.default_rng(3)
    image, clip = _frames(rng, 1, 1), _frames(rng, 1, 4)
    visual = [video_llava.encode(image)[0], video_llava.encode(clip)[0]]
    assert [len(v) for v in visual] == [9, 4 * 10]
    rows = [_ids(rng, 3, 9, IMAGE_ID, 6), _ids(rng, 3, 40, VIDEO_ID, 4)]
    ids, mask = _padded(rows, side)
    expected = video_llava.theirs(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
        pixel_values=video_llava.pixels(image[0]), pixel_values_videos=video_llava.pixels(clip),
    ).logits  # fmt: skip
    found = video_llava.logits(ids, visual, mask)
    seen = mask.astype(bool)
    assert difference(found[seen], expected[torch.from_numpy(seen)]) < TOLERANCE


def test_frames_that_are_absent_change_nothing(onevision):
    """A bucket of five frames with a clip of two is the clip of two, where its tokens are seen."""
    rng = np.random.default_rng(9)
    clip = _frames(rng, 1, 2)
    wide = np.concatenate([clip, np.zeros((1, 3, *clip.shape[2:]), np.uint8)], axis=1)
    there = onevision.config.visual_frames(5) < 2
    visual = onevision.encode(wide)[0][there]
    np.testing.assert_allclose(visual, onevision.encode(clip)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["onevision", "video_llava"])
def test_bfloat16_is_as_near_as_pytorch_gets(name, request):
    """The error of bfloat16, mean and maximum, is at most twice PyTorch's own."""
    import torch

    pair = request.getfixturevalue(name)
    rng = np.random.default_rng(5)
    clip = _frames(rng, 1, 3)
    count = pair.config.num_visual_tokens(3)
    row = _ids(rng, 2, count, VIDEO_ID, 6)
    inputs = {"input_ids": torch.tensor([row]), "pixel_values_videos": pair.pixels(clip)}
    exact = pair.theirs(**inputs).logits
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    theirs = copy.deepcopy(pair.theirs).bfloat16()(**inputs).logits.float()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params)
    model = FunctionalModel(dataclasses.replace(pair.config, dtype="bfloat16"))

    @jax.jit
    def run(params, clip, ids):
        bound = model.bind(params)
        visual = bound.encode(clip, jnp.ones((1, 3), bool), jnp.zeros((1, 3))).visual
        embeds = bound.embed_tokens(ids).at[:, 2 : 2 + count].set(visual)
        ones = jnp.ones(ids.shape, jnp.int32)
        hidden, _ = bound.language.prefill(embeds, jnp.arange(ids.shape[1])[None], ones)
        return (hidden @ bound.language.table.T).astype(jnp.float32)

    ours = np.asarray(run(params, clip, np.array([row])))[..., :200]
    exact = exact.detach().numpy()
    error, reference = np.abs(ours - exact), np.abs(theirs.detach().numpy() - exact)
    assert 0 < error.mean() <= 2 * reference.mean()
    assert error.max() <= 2 * reference.max()
