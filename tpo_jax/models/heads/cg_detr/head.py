"""The network of the CG-DETR head (Moon et al. 2023, 2311.08835, "Correlation-Guided
Query-Dependency Calibration"), conditioned on the prompt and on the task token.

Text is the language model's hidden states of the question, or, where config.text_features says so,
given states of its tokens by a text encoder; then comes the state at the slot. A clip is one frame
of our video encoder, its patches pooled by the slot; or, where config.clip_features says so, the
given features of the part that the frame stands for. Its place in the video is added. Clips read
the text through adaptive cross-attention, a saliency token made for this moment joins them in an
encoder, and a decoder answers with windows. With targets, `__call__` also returns what only the
losses need: predictions for a negative query, moment and sentence tokens, what to distil.

With both kinds of features this is the function of the published tensors (`cg_model` of
OpenGVLab/TPO); interop/families/cg_detr_rows.py names them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.base import HeadInputs, SlotAttention, frame_centres
from tpo_jax.models.heads.cg_detr.decoder import Decoder
from tpo_jax.models.heads.cg_detr.labels import clip_labels, next_of_another_video
from tpo_jax.models.heads.cg_detr.layers import (
    MASKED,
    AdaptiveLayer,
    Encoder,
    InputProjection,
    norm,
    sine_waves,
)
from tpo_jax.models.layers import Linear, Rngs

QUERIES = 10
DUMMIES = 45
PROMPTS = 10
USED_PROMPTS = 1


class _Text(NamedTuple):
    """n slots. words float[n, T, C], valid bool[n, T]; the last word is the state at the slot.

    dummies float[n, DUMMIES, C], what the dummies are for this text.
    """

    words: jax.Array
    valid: jax.Array
    dummies: jax.Array


class _Clips(NamedTuple):
    """float[n, F, C] clips and their positions, bool[n, F]."""

    states: jax.Array
    position: jax.Array
    valid: jax.Array


class _Reading(NamedTuple):
    """Clips that have read a text.

    memory: float[n, F, C]. saliency: float[n, F]. attention: float[n, F, K] to dummies and words.
    relevance: float[n, F] in [0, 1], what of it went to words.
    """

    memory: jax.Array
    saliency: jax.Array
    attention: jax.Array
    relevance: jax.Array


class CgDetrHead(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width, heads, depth = config.head.width, config.head.heads, config.head.layers
        self.given = config.clip_features
        if self.given is None:
            self.patch_proj = Linear(config.vision.width, width, rngs=rngs)
            self.patch_norm = norm(width)
            self.pool = SlotAttention(width, heads, rngs=rngs)
        clip_width = width if self.given is None else self.given.width
        self.clip_proj = InputProjection(clip_width + 2, width, rngs=rngs)
        self.text_proj = InputProjection(config.language.width, width, rngs=rngs)

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))

        # The kind of a token (word, clip), and learned tokens with their positions.
        self.embed = nnx.Dict(
            {
                "kinds": table(2, width),
                "dummies": table(DUMMIES, width), "dummy_places": table(DUMMIES, width),
                "sentence": table(width), "sentence_place": table(width),
                "moment": table(width), "moment_place": table(width),
                "prompts": table(PROMPTS, width), "prompt_place": table(width),
            }
        )  # fmt: skip
        # The published depths are those of head.layers = 2.
        self.dummy_encoder = Encoder(width, heads, depth, rngs=rngs)
        self.sentence_encoder = Encoder(width, heads, 1, rngs=rngs)
        self.moment_encoder = Encoder(width, heads, 1, rngs=rngs)
        self.readers = nnx.Dict(
            {f"layer{i}": AdaptiveLayer(width, heads, rngs=rngs) for i in range(depth)}
        )
        self.encoder = Encoder(width, heads, depth + 1, rngs=rngs)
        self.saliency_clip = Linear(width, width, rngs=rngs)
        self.saliency_token = Linear(width, width, rngs=rngs)
        self.decoder = Decoder(width, heads, depth + 1, QUERIES, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Predictions, float32.

        Returns: of every decoder layer "logits" [B, S, layers, Q, 2] of foreground and background
          and "spans" [B, S, layers, Q, 2], centre and width in [0, 1] of the clip; "saliency"
          [B, S, F]; "relevance" [B, S, F] in [0, 1]; "frame_valid" bool[B, F]. With
          `inputs.targets` also what only the losses read, see `_for_losses`.
        """
        if inputs.prompt is None:
            raise ValueError(
                "cg_detr: HeadInputs.prompt is missing; this head reads the hidden states of the "
                "question, or its text features, so give prompt and prompt_valid"
            )
        B, S, _ = inputs.slot_states.shape
        text = self._text(inputs)
        if inputs.targets is None:
            clips = self._clips(inputs, text.words[:, -1].reshape(B, S, -1))
            own, extra = self._read(text, clips), {}
        else:
            own, clips, extra = self._for_losses(inputs, text)
        logits, spans = self.decoder(own.memory, clips.position, clips.valid)
        found = {
            "logits": logits, "spans": spans, "saliency": own.saliency, "relevance": own.relevance
        }  # fmt: skip
        found = {name: x.reshape(B, S, *x.shape[1:]) for name, x in (found | extra).items()}
        return found | {"frame_valid": inputs.frame_valid}

    def _text(self, inputs: HeadInputs) -> _Text:
        B, S, _ = inputs.slot_states.shape
        states = jnp.concatenate([inputs.prompt, inputs.slot_states[:, :, None]], axis=2)
        valid = jnp.concatenate([inputs.prompt_valid, jnp.ones((B, S, 1), bool)], axis=2)
        states, valid = states.reshape(B * S, *states.shape[2:]), valid.reshape(B * S, -1)
        words = self.text_proj(states) + self.embed["kinds"][0]
        dummies = jnp.broadcast_to(self.embed["dummies"][...], (B * S, DUMMIES, words.shape[-1]))
        # Dummies see the words, so that they can be what these words are not about.
        seen = self.dummy_encoder(
            jnp.concatenate([dummies, words], axis=1), self._key_places(words), _before(valid)
        )
        return _Text(words, valid, seen[:, :DUMMIES])

    def _key_places(self, words: jax.Array) -> jax.Array:
        """float[DUMMIES + T, C]: dummies have places, words have none."""
        return jnp.pad(self.embed["dummy_places"][...], ((0, words.shape[1]), (0, 0)))

    def _clips(self, inputs: HeadInputs, slots: jax.Array) -> _Clips:
        """One clip a frame for each of `slots` float[B, S, C]."""
        frame_valid = inputs.frame_valid
        B, F = frame_valid.shape
        S, C = slots.shape[1:]
        seen = self._pooled(inputs, slots) if self.given is None else self._given(inputs)
        centres = frame_centres(frame_valid)
        half = centres[:, :1]  # of a frame's length: its ends are the published extra features
        ends = jnp.stack([centres - half, centres + half], axis=-1)
        ends = jnp.broadcast_to(ends[:, :, None], (*seen.shape[:3], 2))
        states = self.clip_proj(jnp.concatenate([seen, ends], axis=-1)) + self.embed["kinds"][1]
        states = jnp.broadcast_to(states, (B, F, S, C))
        states = jnp.swapaxes(states, 1, 2).reshape(B * S, F, C)
        # Clip i of n stands where it ends, at (i + 1) / n.
        position = jnp.repeat(sine_waves(centres + half, C), S, axis=0)
        return _Clips(states, position, jnp.repeat(frame_valid, S, axis=0))

    def _pooled(self, inputs: HeadInputs, slots: jax.Array) -> jax.Array:
        """float[B, F, S, C]: of every frame, what each slot finds in its patches."""
        B, F, h, w, _ = inputs.features.patches.shape
        S, C = slots.shape[1:]
        tokens = self.patch_norm(self.patch_proj(inputs.features.patches))
        tokens = tokens.reshape(B * F, h * w, C)
        return self.pool(jnp.repeat(slots, F, axis=0), tokens).reshape(B, F, S, C)

    def _given(self, inputs: HeadInputs) -> jax.Array:
        """float[B, F, 1, D]: the given features, the same for every slot."""
        if inputs.clip_features is None:
            raise ValueError(
                f"cg_detr: HeadInputs.clip_features is missing; this model reads {self.given}, so "
                "give batch['clip_features']"
            )
        return inputs.clip_features[:, :, None]

    def _read(self, text: _Text, clips: _Clips) -> _Reading:
        keys = jnp.concatenate([text.dummies, text.words], axis=1)
        places, valid = self._key_places(text.words), _before(text.valid)
        is_word = jnp.arange(keys.shape[1]) >= DUMMIES
        states, attention = clips.states, 0.0
        for layer in self.readers.values():
            states, weights = layer(states, clips.position, keys, places, valid, is_word)
            attention = attention + weights / len(self.readers)
        relevance = jnp.clip(jnp.sum(attention * (is_word & valid)[:, None], axis=-1), 0.0, 1.0)

        token = self._saliency_token(clips, relevance)[:, None]
        for layer in self.readers.values():  # which, as published, gives it nothing to read
            token = layer.after(token, jnp.zeros_like(token))
        place = self.embed["prompt_place"][...]
        position = jnp.broadcast_to(place, (*token.shape[:2], place.size))
        memory = self.encoder(
            jnp.concatenate([token, states], axis=1),
            jnp.concatenate([position, clips.position], axis=1),
            _before(clips.valid, 1),
        )
        whole, memory = memory[:, :1], memory[:, 1:] + memory[:, :1]
        saliency = jnp.sum(self.saliency_clip(memory) * self.saliency_token(whole), axis=-1)
        return _Reading(memory, saliency * memory.shape[-1] ** -0.5, attention, relevance)

    def _saliency_token(self, clips: _Clips, relevance: jax.Array) -> jax.Array:
        """float[n, C]: the mean clip, and the prompts that are most like the relevant clips."""
        shown = clips.valid[..., None]
        count = jnp.maximum(jnp.sum(shown, axis=1), 1)
        mean = jax.lax.stop_gradient(jnp.sum(clips.states * shown, axis=1) / count)
        prompts = self.embed["prompts"][...]
        likeness = jnp.einsum("nfc,pc->nfp", unit(clips.states - mean[:, None]), unit(prompts))
        weights = jax.lax.stop_gradient(relevance * clips.valid)
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-6)
        shares = jnp.einsum("nf,nfp->np", weights, jax.nn.softmax(likeness, axis=-1))
        share, index = jax.lax.top_k(shares, USED_PROMPTS)
        return mean + jnp.einsum("np,npc->nc", share, prompts[index])

    def _for_losses(
        self, inputs: HeadInputs, text: _Text
    ) -> tuple[_Reading, _Clips, dict[str, jax.Array]]:
        """Every clip reads its own text and, in the same pass, that of another video.

        Returns: what was read, the clips, and, of each of n slots: "negative" bool, whether there
          is another video, with "negative_saliency" and "negative_relevance" [F]; "video", its
          row's id; "moment", "other" (not of the moment), "sentence", "dummy_sentence" [C];
          "clip_match" [F] logits of a clip belonging to the moment; "attention" and
          "attention_target" [F, K] with "key_valid" [K]; "overlap" of dummies and of prompts.
        """
        if inputs.video_ids is None:
            raise ValueError(
                "cg_detr: HeadInputs.video_ids is missing; the losses compare a slot with those of "
                "other videos, so give batch['video_ids']"
            )
        B, S, _ = inputs.slot_states.shape
        index, has_negative = next_of_another_video(inputs.targets["valid"], inputs.video_ids)
        both = jax.tree.map(lambda own: _paired(own, own[index]), text)
        clips = self._clips(inputs, both.words[:, -1].reshape(B, 2 * S, -1))
        read = self._read(both, clips)
        own, other = (jax.tree.map(lambda x, i=i: x[i::2], read) for i in range(2))
        clips = jax.tree.map(lambda x: x[::2], clips)
        extra = {
            "negative": has_negative, "negative_saliency": other.saliency,
            "negative_relevance": other.relevance, "video": jnp.repeat(inputs.video_ids, S),
            "attention": own.attention, "key_valid": _before(text.valid),
            "overlap": overlap(text.dummies) + overlap(self.embed["prompts"][...]),
        }  # fmt: skip
        labels = clip_labels(inputs.targets, inputs.targets["valid"], inputs.frame_valid)
        relevant = labels.relevant.reshape(B * S, -1)
        return own, clips, extra | self._tokens(text, clips, relevant)

    def _tokens(self, text: _Text, clips: _Clips, relevant: jax.Array) -> dict[str, jax.Array]:
        """Sentence and moment tokens, and how alike clips and words are."""
        start, place = self.embed["sentence"][...], self.embed["sentence_place"][...]
        words = self.sentence_encoder(
            _led(start, text.words), _led(place, jnp.zeros_like(text.words)), _before(text.valid, 1)
        )
        places = jnp.broadcast_to(self.embed["dummy_places"][...], text.dummies.shape)
        dummies = self.sentence_encoder(
            _led(start, text.dummies), _led(place, places),
            jnp.ones((len(places), 1 + DUMMIES), bool),
        )  # fmt: skip

        masks = _paired(relevant & clips.valid, ~relevant & clips.valid)
        moments = self.moment_encoder(
            _led(self.embed["moment"][...], _paired(clips.states, clips.states)),
            _led(self.embed["moment_place"][...], _paired(clips.position, clips.position)),
            _before(masks, 1),
        )
        inside, outside = moments[::2], moments[1::2]
        moment, frames = inside[:, 0], inside[:, 1:]
        known = jnp.concatenate([dummies[:, 1:], words[:, 1:]], axis=1)
        likeness = jnp.einsum("nfc,nkc->nfk", frames, known)
        likeness = jnp.where(_before(text.valid)[:, None], likeness, MASKED)
        frames = jnp.where(relevant[..., None], frames, outside[:, 1:])
        return {
            "moment": moment, "other": outside[:, 0], "sentence": words[:, 0],
            "dummy_sentence": dummies[:, 0],
            "clip_match": jnp.einsum("nc,nfc->nf", moment, frames),
            "attention_target": jax.lax.stop_gradient(jax.nn.softmax(likeness, axis=-1)),
        }  # fmt: skip


def unit(x: jax.Array) -> jax.Array:
    """float[..., C] -> float32[..., C], vectors of length 1; its gradient is finite at 0."""
    x = x.astype(jnp.float32)  # a table may be bfloat16
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def overlap(vectors: jax.Array) -> jax.Array:
    """float[..., m, C] -> float[...]: mean |cosine| of different vectors over all m * m pairs.

    One side is constant, as published.
    """
    vectors = unit(vectors)
    cosines = jnp.einsum("...ic,...jc->...ij", vectors, jax.lax.stop_gradient(vectors))
    return jnp.mean(jnp.abs(cosines) * (1 - jnp.eye(vectors.shape[-2])), axis=(-2, -1))


def _before(valid: jax.Array, count: int = DUMMIES) -> jax.Array:
    """bool[n, T] -> bool[n, count + T], the new ones True."""
    return jnp.pad(valid, ((0, 0), (count, 0)), constant_values=True)


def _led(first: jax.Array, rest: jax.Array) -> jax.Array:
    """float[C], float[n, T, C] -> float[n, 1 + T, C]."""
    first = jnp.broadcast_to(first, (rest.shape[0], 1, rest.shape[-1]))
    return jnp.concatenate([first, rest], axis=1)


def _paired(one: jax.Array, other: jax.Array) -> jax.Array:
    """[n, ...] twice -> [2 * n, ...] in turn, so that the slots of a row stay together."""
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])
