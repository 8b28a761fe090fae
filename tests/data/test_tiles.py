"""Rows of images in tiles: shapes, what is there of them, which bucket they go to."""

import jax
import numpy as np
import pytest
from fake_batches import bucket
from fake_dataset import FakeDataset

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.evidence import apply_evidence
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline, blank_batch, row_builder
from tpo_jax.data.preprocess import anyres_tiles
from tpo_jax.data.records import Example, Turn, VideoInfo
from tpo_jax.data.row_plans import BranchPlan, RowError, RowPlan
from tpo_jax.data.rows import choose_builder, stack_rows
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.data.tiles import level_of, tiles_of
from tpo_jax.errors import UserError
from tpo_jax.generation.sampler import PREFIX_ARRAYS, TILE_ARRAYS, Sampler, Sampling
from tpo_jax.models.connectors.tiling import tiling_of
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.training.flops import matmul_flops

CODEC = TextCodec(train_tokenizer(["a red square moves"], 300))
MODELS = {name: preset(f"{name}_tiny") for name in ("llava_onevision", "longva")}


def shapes(tiles, name="image"):
    return bucket(
        2, name=name, media="image", frames=1, tiles=tiles, slots={}, branch_tokens=24, answers=8
    )


class Images(FakeDataset):
    """Random images of (height, width), one question about each."""

    def __init__(self, sizes):
        rng = np.random.default_rng(0)
        self.pixels = {f"{h}x{w}": rng.integers(1, 256, (h, w, 3), np.uint8) for h, w in sizes}
        turns = (Turn("what is it?", "a red square"),)
        examples = {
            name: [Example(name, name, "image", "conversation", "test", 0.0, 0.0, turns, {})]
            for name in self.pixels
        }
        infos = {
            name: VideoInfo("image", 0.0, 1, np.zeros(1, np.float32), *pixels.shape[:2])
            for name, pixels in self.pixels.items()
        }
        super().__init__("images", examples, infos)

    def frames(self, video_id, indices):
        return self.pixels[video_id][None]

    def plan(self, name):
        (example,) = self.examples(name)
        branch = BranchPlan(example, 0, example.turns[0].question, example.turns[0].answer)
        return RowPlan(self, name, 0.0, 0.0, (branch,))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_equal_those_that_are_planned(name):
    config, of = MODELS[name], shapes(4)
    built = blank_batch(row_builder(CODEC, config, of))
    spec = batch_spec(of, config)
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in (built, spec)]
    assert described[0] == described[1]
    model = FunctionalModel(config)
    outputs = jax.eval_shape(lambda p, b: model.bind(p)(b), model.abstract(), spec)
    # 4 x 4 patches a tile: the whole image and four tiles in a column, which has most rows and so
    # most newlines; or 2 x 2 of each tile.
    count = {"llava_onevision": 16 + 16 * 5, "longva": 4 * 4}[name]
    assert outputs.encoded.visual.shape == (2, count, 32)
    assert outputs.encoded.features is None  # nothing reads them
    model = FunctionalModel(preset(f"{name}_tiny", ("temporal",)))
    encoded = jax.eval_shape(lambda p, b: model.bind(p).encode_batch(b), model.abstract(), spec)
    assert encoded.visual.shape == (2, count, 32)
    assert encoded.features.patches.shape == (2, 1, 4, 4, 32)  # what heads see


def test_the_tower_runs_on_the_whole_image_for_a_head_alone():
    """UniRes before an answer: four tiles, and the whole image if a head may be called."""
    tokenizer = train_tokenizer(["a red square moves"], 300)
    add_task_tokens(tokenizer, ("temporal",))
    spec = batch_spec(shapes(4), MODELS["longva"])
    batch = {name: spec[name] for name in PREFIX_ARRAYS + TILE_ARRAYS}

    def prefill_flops(heads):
        model = FunctionalModel(preset("longva_tiny", heads))
        sampler = Sampler(model, TextCodec(tokenizer), Sampling())
        return matmul_flops(sampler._prefill_rows, model.abstract(), batch)

    tower = MODELS["longva"].vision
    width, patches, tokens = tower.width, tower.grid**2, tower.grid**2 + 1
    layer = 2 * tokens * (4 * width**2 + 2 * width * tower.mlp_width) + 4 * tokens**2 * width
    image = 2 * patches * 3 * tower.patch_size**2 * width + tower.layers_run * layer
    assert prefill_flops(("temporal",)) - prefill_flops(()) == 2 * image > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_row_holds_the_tiles_and_sees_the_tokens_that_are_there(name):
    config, data = MODELS[name], Images([(32, 64), (30, 90)])
    builder = row_builder(CODEC, config, shapes(4))
    tiling, offset = tiling_of(config), CODEC.template.visual_offset
    for image, tiles in (("32x64", 2), ("30x90", 3)):
        row = builder.build(data.plan(image), 0)
        pixels = data.pixels[image]
        expected = anyres_tiles(pixels, config.connector.resolutions, 32)[1:]
        assert len(expected) == tiles
        np.testing.assert_array_equal(row["tiles"][:tiles], expected)
        assert not row["tiles"][tiles:].any()
        index, weight = tiling.tokens(pixels.shape[:2], 4)
        n, V = len(index), builder.visual_tokens
        np.testing.assert_array_equal(row["tile_index"][:n], index)
        assert not row["tile_weight"][n:].any() and n <= V
        seen = row["prefix_segments"][offset : offset + V]
        np.testing.assert_array_equal(seen, np.arange(V) < n)
        # Nothing is between the tokens of the image and what closes it.
        places = row["prefix_positions"][row["prefix_segments"] > 0]
        np.testing.assert_array_equal(places, np.arange(len(places)))
        assert row["branch_positions"][0, 0] == len(places)


def test_images_go_to_the_least_bucket_that_holds_their_tiles():
    config, data = MODELS["longva"], Images([(32, 32), (64, 64), (96, 96)])
    group = [row_builder(CODEC, config, shapes(tiles)) for tiles in (1, 4)]
    for image, builder in (("32x32", 0), ("64x64", 1), ("96x96", 1)):
        assert choose_builder(group, data.plan(image)) is group[builder]
    group[1].check(data.plan("64x64"))
    with pytest.raises(RowError, match="96 x 96 pixels.*it has 9 tiles, but the bucket has tiles"):
        group[1].check(data.plan("96x96"))
    images = [data.video_info(name) for name in data.videos]
    assert tiles_of(config, images) == 9 and tiles_of(preset("micro"), images) == 0
    assert [level_of(config, image) for image in images] == [1, 4, 9]


def test_two_buckets_of_images_differ_in_room():
    config, data = MODELS["longva"], Images([(32, 32)])
    source = [Source(data, 1.0, {"conversation": 1.0})]
    with pytest.raises(UserError, match="both image with branch_tokens 24; a question goes"):
        Pipeline(source, CODEC, config, (), [shapes(4), shapes(4, "other")], 0)


def test_blind_rows_hide_the_tiles():
    data = Images([(32, 64)])
    row = row_builder(CODEC, MODELS["longva"], shapes(2)).build(data.plan("32x64"), 0)
    batch = stack_rows([row])
    assert batch["tiles"].any()
    blind = apply_evidence(batch, "blind")
    assert not blind["tiles"].any() and not blind["frames"].any()
    offset, V = CODEC.template.visual_offset, batch["tile_index"].shape[1]
    assert not blind["prefix_segments"][0, offset : offset + V].any()


@pytest.mark.parametrize("changes", [
    {"media": "video"}, {"frames": 2}, {"question": 4, "branches": 2},
])  # fmt: skip
def test_only_conversations_about_images_have_tiles(changes):
    fields = {"media": "image", "frames": 1, "tiles": 3, "slots": {}}
    with pytest.raises(UserError, match="buckets.video.tiles: 3 with .* expected images of one"):
        bucket(2, **fields | changes)


def test_a_family_of_one_view_refuses_tiles():
    with pytest.raises(UserError, match="sees images as one view"):
        row_builder(CODEC, preset("video_llava_tiny"), shapes(4))
