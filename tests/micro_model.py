"""A micro model with random weights, its codec, and videos in memory, for generation tests."""

import dataclasses
import pathlib

import jax
import numpy as np

from tpo_jax.data import text
from tpo_jax.data.records import Example, VideoInfo
from tpo_jax.data.text import TASK_TOKENS
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel

COLOURS = ("red", "green", "blue", "yellow")
QUESTIONS = tuple(f"What does the {colour} circle do?" for colour in COLOURS)
HEADS = ("region", "temporal", "mask")


class MemoryDataset:
    """Random videos of 24 frames at 2 frames a second, with the interface of PreparedDataset."""

    path = pathlib.Path("memory")

    def __init__(self, videos: int = 3, examples=None):
        self.videos = [f"video{i}" for i in range(videos)]
        self._examples = examples or {}

    def video_info(self, video_id):
        times = np.arange(24, dtype=np.float32) / 2
        return VideoInfo("video", 12.0, 24, times, 32, 32)

    def frames(self, video_id, indices):
        seed = int(video_id.removeprefix("video"))
        video = np.random.default_rng(seed).integers(0, 256, (24, 32, 32, 3), np.uint8)
        return video[np.asarray(indices)]

    def examples(self, video_id):
        return self._examples.get(video_id, [])


def conversation(video_id, turns, start=0.0, end=12.0, name="talk"):
    return Example(f"{video_id}/{name}", video_id, "video", "conversation", "test", start, end,
                   tuple(turns), {})


def make_codec(heads=HEADS):
    texts = [*QUESTIONS, "it moves left then right", "it blinks and grows",
             "Where is the red circle? It is here", "1234567890 s", "Options: a; b; c."]
    tokenizer = text.train_tokenizer(texts, 330)
    text.add_task_tokens(tokenizer, heads)
    return text.TextCodec(tokenizer)


def make_model(codec, heads=HEADS):
    config = preset("micro", heads, codec.task_tokens)
    language = dataclasses.replace(config.language, num_tokens=codec.vocab_size)
    return FunctionalModel(dataclasses.replace(config, language=language))


def make_params(model):
    """Random weights, with the output table scaled up so that answers differ."""
    params = jax.jit(model.init)(jax.random.key(0))
    params["language"]["lm_head"]["kernel"] = params["language"]["lm_head"]["kernel"] * 4.0
    return params


def that_says(params, codec, *favourites):
    """Weights under which the next token depends on the position alone: the favourites in turn.

    The residual stream is silenced and the embedding of each favourite points at the next one.
    """
    language = jax.tree.map(np.array, params["language"])
    for name in ("o_proj", "down_proj"):
        block = "self_attn" if name == "o_proj" else "mlp"
        language["layers"][block][name]["kernel"][:] = 0.0
    width = language["embed"]["table"].shape[1]
    language["embed"]["table"][:] = 0.0
    language["lm_head"]["kernel"][:] = 0.0
    assistant, = codec._assistant
    task_tokens = jax.tree.map(lambda x: np.zeros_like(np.array(x)), params["task_tokens"])
    slots = {codec.special_ids[slot]: head for head, (_, slot) in TASK_TOKENS.items()}
    for axis, (now, after) in enumerate(zip((assistant, *favourites), favourites)):  # noqa: B905
        assert axis < width
        if now in slots:
            task_tokens[slots[now]][axis] = 1.0
        language["embed"]["table"][now, axis] = 1.0
        language["lm_head"]["kernel"][axis, after] = 1.0
    return {**params, "language": language, "task_tokens": task_tokens}


def that_draws(params, codec, *texts):
    """Weights under which every token of `texts`, or the end, is equally likely everywhere."""
    language = jax.tree.map(np.array, params["language"])
    for block, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        language["layers"][block][name]["kernel"][:] = 0.0
    language["embed"]["table"][:] = np.eye(1, language["embed"]["table"].shape[1])
    language["lm_head"]["kernel"][:] = 0.0
    language["lm_head"]["kernel"][0] = -4.0
    tokens = [token for text in texts for token in codec.encode(text)]
    language["lm_head"]["kernel"][0, [*tokens, codec.eos_id]] = 4.0
    return {**params, "language": language}
