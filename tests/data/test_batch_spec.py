"""Abstract shapes equal the ones that the row builder makes."""

import dataclasses

import jax
import pytest
from fake_batches import HEADS, bucket, pair_bucket

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import fitted
from tpo_jax.data.pipeline import blank_batch, row_builder
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.models.presets import PRESETS


def codec_of(heads):
    tokenizer = train_tokenizer(["a red square moves", "it is blue"], 300)
    add_task_tokens(tokenizer, heads)
    return TextCodec(tokenizer)


@pytest.mark.parametrize("heads", [(), ("temporal",), HEADS])
@pytest.mark.parametrize("shapes", [bucket(2), pair_bucket(2), bucket(2, media="image", frames=1)])
def test_equals_the_row_builder(heads, shapes):
    codec = codec_of(heads)
    config = dataclasses.replace(PRESETS["micro"](heads), tokens=codec.task_tokens)

    def reference(*_):
        raise AssertionError("a blank row has no reference")

    for scored in (True, False):
        built = blank_batch(row_builder(codec, config, shapes, reference if scored else None))
        want = jax.tree.map(lambda x: (x.shape, x.dtype), built)
        spec = batch_spec(shapes, config, reference=scored)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), spec) == want




@pytest.mark.parametrize("media, frames", [("video", 4), ("image", 1)])
def test_equals_the_row_builder_of_a_checkpoints_template(media, frames):
    """More than one token behind the video, and the times of its frames in words."""
    codec = codec_of(())
    template = dataclasses.replace(
        codec.template, after_video="</video> it is", after_image="</image> it is",
        time_instruction=True,
    )  # fmt: skip
    codec = TextCodec(codec.tokenizer, template)
    shapes = fitted(bucket(2, media=media, frames=frames, slots={}), codec)
    builder = row_builder(codec, PRESETS["micro"](()), shapes)
    prefix = batch_spec(shapes, PRESETS["micro"](()))["prefix_tokens"].shape[1]
    assert prefix == builder.prefix_tokens == len(builder.blank()["prefix_tokens"])
    plain = batch_spec(bucket(2, media=media, frames=frames), PRESETS["micro"](()))
    more = codec.after_visual - 1 + (codec.time_room(4) if media == "video" else 0)
    assert prefix - plain["prefix_tokens"].shape[1] == more > 1


@pytest.mark.parametrize("question, positions", [(1, None), (3000, 3072)])
def test_long_prefixes_are_whole_tiles(question, positions):
    """The builder and the shapes agree, and what is added holds nothing."""
    codec, config = codec_of(()), PRESETS["micro"](())
    shapes = bucket(2, slots={}, question=question, branches=2)
    builder = row_builder(codec, config, shapes)
    row = builder.blank()
    assert len(row["prefix_segments"]) == (positions or builder.prefix_tokens)
    assert batch_spec(shapes, config)["prefix_tokens"].shape == (2, len(row["prefix_tokens"]))
    assert not row["prefix_segments"].any()
