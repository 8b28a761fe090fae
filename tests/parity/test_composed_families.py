"""Composed families as they are used: images and videos in one batch, padding, bfloat16, 64 greedy
tokens, and what sampling draws from. Every layer of one clip: test_whole_families.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.families.configs import CONFIGS
from tests.interop.families.folders import BEFORE, load, prompt, with_vocabulary, write_folder
from tests.parity.composed import VISUAL, compose, compose_siglip2_qwen3
from tests.parity.joined import write_joined
from tests.parity.towers import difference
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys
from tpo_jax.interop.families.folder import import_family
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.models.connectors.tiling import tiling_of
from tpo_jax.models.video_language import FunctionalModel

pytestmark = pytest.mark.parity
TOLERANCE, STEPS = 2e-4, 64
SIZE = (20, 50)  # of an image, (height, width), for families with tiles


class Pair:
    """Our model of a folder, and the same in PyTorch."""

    def __init__(self, name, path):
        if name == "siglip2_qwen3":
            write_joined(path)
            self._compose = lambda dtype: compose_siglip2_qwen3(path / "exported", dtype)
        else:
            write_folder(path / "source", CONFIGS[name])
            import_family(path / "source", path / "model")
            data = with_vocabulary(CONFIGS[name])
            tensors = {k: np.array(v) for k, v in read_tensors(path / "source").items()}
            self._compose = lambda dtype: compose(name, data, tensors, dtype)
        self.model, self.params, self.codec = load(path / "model")
        self.theirs = self._compose("float32")

    def in_bfloat16(self):
        """Our model and parameters, and theirs."""
        config = dataclasses.replace(self.model.config, dtype="bfloat16")
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.params)
        return FunctionalModel(config), params, self._compose("bfloat16")

    def see(self, theirs, frames, size=None):
        """Their tokens [V, D] of uint8[F, S, S, 3]."""
        import torch

        vision = self.model.config.vision
        pixels = (frames / 255 - np.array(vision.mean)) / np.array(vision.std)
        return theirs.see(torch.from_numpy(pixels.astype(np.float32)), size)

    def barred(self):
        """Tokens that no answer has: special ones, and rows of their table without a token."""
        kept = set(range(self.codec.vocab_size)) - set(self.codec.special_ids.values())
        tokens = range(self.theirs.language.config.vocab_size)
        return sorted(set(tokens) - kept - set(self.codec.stop_ids))


class Rows:
    """Rows of an image, of a video, and of both again: padded left, then right.

    Attributes:
      ids: int64[4, T], visual tokens as -1; mask: int64[4, T].
      clips: what makes the tokens of the image and of the video, a batch of one row each.
      seen: their frames and, of an image in tiles, its size.
      visual: PyTorch's tokens [V, D] of both.
      logits: PyTorch's float32[4, T, V].
    """

    def __init__(self, pair):
        rng = np.random.default_rng(6)
        image, tiles, size = image_of(pair.model.config, rng)
        video = prompt(pair.model.config)[0]
        self.clips = (image, {name: video[name] for name in video if name.startswith("frame")})
        self.seen = ((tiles, size), (video["frames"][0], None))
        self.visual = [pair.see(pair.theirs, *clip) for clip in self.seen]
        texts = [rng.integers(20, 280, number) for number in (4, 7)]
        rows = [
            np.concatenate([text[:3], np.full(len(visual), -1), text[3:]])
            for text, visual in zip(texts, self.visual, strict=True)
        ]
        length = 2 + max(map(len, rows))  # no row is full
        self.ids, self.mask = np.zeros((2, 4, length), np.int64)
        for i, row in enumerate(rows):
            left, right = slice(length - len(row), length), slice(len(row))
            for number, place in ((i, left), (i + 2, right)):
                self.ids[number, place], self.mask[number, place] = row, 1
        self.logits = self.theirs(pair.theirs, self.visual)

    def theirs(self, model, visual):
        import torch

        embeds = [model.embeds(row, visual[i % 2]) for i, row in enumerate(self.ids)]
        with torch.no_grad():
            mask = torch.from_numpy(self.mask)
            out = model.language(inputs_embeds=torch.stack(embeds), attention_mask=mask)
        return out.logits.float().numpy()

    def ours(self, model, params):
        """float32[4, T, V'], the image and the video encoded once; V' has no rows that fill the
        table up."""
        positions = np.where(self.mask, np.cumsum(self.mask, axis=1) - 1, 0)

        @jax.jit
        def run(params, clips):
            bound = model.bind(params)
            visual = [bound.encode_batch(clip).visual[0] for clip in clips]
            words = bound.embed_tokens(np.maximum(self.ids, 0))
            embeds = [
                words[i].at[np.flatnonzero(row < 0)].set(visual[i % 2])
                for i, row in enumerate(self.ids)
            ]
            hidden, _ = bound.language.prefill(jnp.stack(embeds), positions, self.mask)
            return hidden @ bound.language.table[: model.config.language.num_tokens].T

        return np.asarray(run(params, self.clips), np.float32)


def image_of(config, rng):
    """A random image: a batch of one row, uint8[F, S, S, 3] of its frame or tiles, its size."""
    tiling, side = tiling_of(config), config.vision.image_size
    tiles = 0 if tiling is None else tiling.tiles(SIZE)
    frames = rng.integers(0, 256, (1 + tiles, side, side, 3)).astype(np.uint8)
    batch = {
        "frames": frames[None, :1], "frame_valid": np.ones((1, 1), bool),
        "frame_times": np.zeros((1, 1), np.float32),
    }  # fmt: skip
    if tiling is None:
        return batch, frames, None
    index, weight = tiling.tokens(SIZE, tiles)
    batch |= {"tiles": frames[None, 1:], "tile_index": index[None], "tile_weight": weight[None]}
    return batch, frames, SIZE


@pytest.fixture(scope="module", params=[*VISUAL, "siglip2_qwen3"])
def pair(request, tmp_path_factory):
    pytest.importorskip("transformers")
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def rows(pair):
    return Rows(pair)


def test_an_image_and_a_video_in_one_batch_padded_left_and_right(pair, rows):
    found, seen = rows.ours(pair.model, pair.params), rows.mask > 0
    assert not seen.all(axis=1).any()
    assert difference(found[seen], rows.logits[seen][:, : found.shape[-1]]) < TOLERANCE
    assert float(np.std(found[seen])) > 0.1


def test_bfloat16_is_as_near_as_pytorch_gets(pair, rows):
    """The error of bfloat16 over image and video, mean and maximum, is at most twice PyTorch's."""
    model, params, theirs = pair.in_bfloat16()
    seen = rows.mask > 0
    rough = rows.theirs(theirs, [pair.see(theirs, *clip) for clip in rows.seen])[seen]
    found, exact = rows.ours(model, params)[seen], rows.logits[seen]
    error = np.abs(found - exact[:, : found.shape[-1]])
    reference = np.abs(rough - exact)[:, : found.shape[-1]]
    assert 0 < error.mean() <= 2 * reference.mean()
    assert error.max() <= 2 * reference.max()


def questions(config):
    """Two questions to each of two clips, of unequal lengths: a batch, and each in one row int64[T]
    with visual tokens as -1, clip by clip."""
    parts = [prompt(config, seed=seed)[0] for seed in (8, 9)]
    batch = {k: np.concatenate([part[k] for part in parts]) for k in parts[0] if k != "slots"}
    batch["slots"] = {}
    # Behind the second clip is a word less.
    batch["prefix_segments"][1, -1] = 0
    batch["branch_positions"][1] -= 1
    for name in ("branch_tokens", "branch_positions", "branch_segments"):
        batch[name] = np.repeat(batch[name], 2, axis=1)
    batch["branch_tokens"][:, 1] = batch["branch_tokens"][:, 1, ::-1]
    batch["branch_segments"][:, 1, -3:] = 0
    visual = config.num_visual_tokens(batch["frames"].shape[1])
    rows = []
    for b, k in np.ndindex(2, 2):
        prefix = batch["prefix_tokens"][b].astype(np.int64)
        prefix[BEFORE : BEFORE + visual] = -1
        rows.append(np.concatenate([
            prefix[batch["prefix_segments"][b] > 0],
            batch["branch_tokens"][b, k][batch["branch_segments"][b, k] > 0],
        ]))  # fmt: skip
    return batch, rows


def test_the_sampler_gives_the_same_64_tokens(pair):
    """Here rows share a prefix and end in padding, there they are whole and begin with it."""
    import torch

    batch, rows = questions(pair.model.config)
    sampler = Sampler(pair.model, pair.codec, Sampling(max_new=STEPS))
    context = sampler.prefill(pair.params, batch)
    found = sampler.generate(
        pair.params, context, batch, branch_keys(0, np.zeros((2, 2), np.uint32))
    )
    assert (found.lengths == STEPS).all()  # no stop

    visual = [pair.see(pair.theirs, frames) for frames in batch["frames"]]
    embeds = [pair.theirs.embeds(row, visual[i // 2]) for i, row in enumerate(rows)]
    pad = torch.nn.utils.rnn.pad_sequence
    out = pair.theirs.language.generate(
        inputs_embeds=pad(embeds, batch_first=True, padding_side="left").detach(),
        attention_mask=pad([torch.ones(len(row), dtype=torch.long) for row in rows],
                           batch_first=True, padding_side="left"),
        do_sample=False, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0,
        suppress_tokens=pair.barred(), return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    tokens = np.asarray(found.tokens).reshape(4, STEPS)
    np.testing.assert_array_equal(tokens, out.sequences.numpy())
    assert np.unique(tokens).size > 8  # not one token over and over
    # No choice hangs on round-off.
    best = torch.stack(out.scores).topk(2).values
    assert float((best[..., 0] - best[..., 1]).min()) > TOLERANCE


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.0, 0.9), (2.0, 0.6)])
def test_tokens_are_drawn_from_the_distribution_of_transformers(pair, rows, temperature, top_p):
    import torch
    from transformers import (
        LogitsProcessorList,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    logits = rows.logits[rows.mask > 0][:24]
    warp = LogitsProcessorList([
        SuppressTokensLogitsProcessor(pair.barred()), TemperatureLogitsWarper(temperature),
        TopPLogitsWarper(top_p),
    ])  # fmt: skip
    wanted = warp(None, torch.from_numpy(logits)).softmax(-1).numpy()
    sampler = Sampler(pair.model, pair.codec, Sampling(temperature=temperature, top_p=top_p))
    spare = pair.model.config.language.vocab_size - logits.shape[1]
    ours = jnp.pad(logits, ((0, 0), (0, spare)))[None]  # rows that fill the table up
    warped = sampler._warp(ours, jnp.zeros(ours.shape[:2], jnp.int32))
    found = np.asarray(jax.nn.softmax(warped))[0]
    assert not found[:, logits.shape[1] :].any()
    found = found[:, : logits.shape[1]]
    np.testing.assert_array_equal(found > 0, wanted > 0)
    assert difference(found, wanted) < 1e-6
    assert (found > 0).sum(-1).min() > 1

    many = 4096  # draws from the logits of one token
    places = np.arange(many, dtype=np.uint32)[None]
    drawn = sampler._draw(
        jnp.broadcast_to(ours[:, :1], (1, many, ours.shape[-1])), jnp.zeros((1, many), jnp.int32),
        branch_keys(0, places),
    )  # fmt: skip
    share = np.bincount(np.asarray(drawn)[0], minlength=logits.shape[1]) / many
    deviation = np.sqrt(wanted[0] * (1 - wanted[0]) / many)
    # Of a rare token one draw is already many deviations.
    assert (np.abs(share - wanted[0]) <= 5 * deviation + 4 / many).all()
    assert not share[wanted[0] == 0].any()
