"""SAM 2 as a mask head, prompted by the slot state or by a box that the user draws.

The adapter is that of Task Preference Optimization (2412.19326): two linear layers turn the slot
state into the three tokens that a box would be. It is tried on every frame by itself; the frame
where SAM 2 is surest that the object is there, and of its mask, becomes the prompted one, and the
object is tracked from it in both directions. So it need not be there when the clip starts. A drawn
box, or points, prompt the frame that they are drawn on. A second pair of layers reads that box out
of the slot state; as published nothing but its loss needs it, which shapes the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads.base import HeadInputs
from tpo_jax.models.heads.sam2.image_encoder import ImageFeatures
from tpo_jax.models.heads.sam2.layers import resize_masks
from tpo_jax.models.heads.sam2.mask_decoder import MASKS, Decoded, choose, pick
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.heads.sam2.prompt_encoder import FILLING, PromptEncoder
from tpo_jax.models.heads.sam2.tracking import (
    Followed,
    Prompt,
    Tracked,
    begin,
    go_on,
    stills,
    track,
    turned,
)
from tpo_jax.models.layers import Mlp, Rngs
from tpo_jax.models.towers.interpolate import resize_grid

# Tokens of a box: its two corners and a filling.
BOX_TOKENS = 3


class Sam2Head(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        self.config = config.sam2
        self.mask_size = config.mask_size
        self.network = Sam2(config.sam2, rngs=rngs)
        width = config.language.width
        self.adapter = Mlp(
            width, width, BOX_TOKENS * config.sam2.width, rngs=rngs, activation=jax.nn.relu
        )
        self.box_readout = Mlp(width, width, 4, rngs=rngs, activation=jax.nn.relu)

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Returns float32 arrays.

        "masks" [B, S, F, m, m] and "presence" [B, S, F], logits; with targets also what `losses`
        reads: of tracking and of every frame by itself ("still_...") all "candidates"
        [B, S, F, 4, m, m], their "iou" [B, S, F, 4] and which were "asked" for, bool; and
        "labelled_box" [B, S, 4], that of the object's mask in the prompted frame, xyxy in [0, 1],
        zeros where it has none; "prompt_error" [B, S], what lies between the adapter's tokens and
        those of that box; "box" [B, S, 4], that box as read out of the slot state.
        """
        F = inputs.frame_valid.shape[1]
        training = inputs.targets is not None
        read = self._reader(self._pixels(inputs.frames), keep=training)
        prompt, tokens, alone = self._prompt(inputs, read)
        start = prompt.frame
        count = jnp.sum(inputs.frame_valid, axis=-1)
        tracked = track(self.network, read, prompt, F, count, keep=training)
        found = self._said(tracked)
        if not training:
            return found
        single = jnp.arange(MASKS) == 0
        at_start = (jnp.arange(F) == start[..., None])[..., None]
        found |= self._candidates(tracked.decoded, "", jnp.where(at_start, single, ~single))
        asked = jnp.broadcast_to(single, alone.iou.shape)
        found |= self._candidates(alone, "still_", asked)
        boxes = labelled_boxes(inputs.targets, start)
        return found | {
            "labelled_box": boxes, "prompt_error": self._prompt_error(tokens, boxes),
            "box": self.box_readout(inputs.slot_states),
        }  # fmt: skip

    def begin(
        self, inputs: HeadInputs
    ) -> tuple[jax.Array, dict[str, jax.Array], Followed]:
        """Which shown frame int32[B, S] each object is prompted on, "masks" [B, S, 1, m, m] and
        "presence" [B, S, 1] there, logits, and what `go_on` carries."""
        read = self._reader(self._pixels(inputs.frames), keep=False)
        prompt, *_ = self._prompt(inputs, read)
        found, followed = begin(self.network, read(prompt.frame), prompt)
        return prompt.frame, self._said(found), followed

    def turned(self, followed: Followed) -> Followed:
        return turned(followed)

    def go_on(
        self,
        followed: Followed,
        pictures: jax.Array,
        start: jax.Array,
        frames: tuple[jax.Array, jax.Array],
        count: jax.Array,
        direction: jax.Array,
    ) -> tuple[Followed, dict[str, jax.Array]]:
        """The next W frames of a pass, "masks" [B, S, W, m, m] and "presence" [B, S, W].

        Args:
          pictures: float32[W, H, W', 3] in [-1, 1], of one video (B = 1).
          start, frames, count, direction: as in `tracking.go_on`.
        """

        def read(place: jax.Array) -> ImageFeatures:
            return self.network.features(self._pixels(pictures[place][None, None]))

        followed, found = go_on(self.network, read, followed, start, frames, count, direction)
        return followed, self._said(found)

    def _said(self, found: Tracked) -> dict[str, jax.Array]:
        return {"masks": resize_masks(found.masks, self.mask_size), "presence": found.presence}

    def _prompt(
        self, inputs: HeadInputs, read: Callable[[jax.Array], ImageFeatures]
    ) -> tuple[Prompt, jax.Array, Decoded]:
        """The prompt of every object, the adapter's tokens, and what these find in every shown
        frame by itself."""
        tokens = self.adapter(inputs.slot_states)
        tokens = tokens.reshape(*tokens.shape[:2], BOX_TOKENS, self.config.width)
        prompted = prompt_tokens(self.network.prompt_encoder, tokens, inputs)
        # Of a drawn prompt too: that one holds on its frame alone.
        alone = stills(self.network, read, tokens, inputs.frame_valid.shape[1])
        start = best_frame(alone, inputs.frame_valid)
        if inputs.targets is not None:
            start = best_labelled_frame(inputs.targets, inputs.frame_valid, start)
        if inputs.boxes is not None:
            start = jnp.where(inputs.box_valid, inputs.box_frame, start)
        if inputs.points is not None:
            given = jnp.any(inputs.point_labels != FILLING, axis=-1)
            start = jnp.where(given, inputs.point_frame, start)
        return dataclasses.replace(prompted, frame=start), tokens, alone

    def _pixels(self, frames: jax.Array) -> jax.Array:
        """float32[B, F, H, W, 3] in [-1, 1] -> [B, F, image_size, image_size, 3] as published."""
        size = self.config.image_size
        if frames.shape[-3:-1] != (size, size):
            frames = resize_grid(frames, (size, size), antialias=True)
        mean, std = jnp.asarray(self.config.mean), jnp.asarray(self.config.std)
        return ((frames + 1.0) / 2.0 - mean) / std

    def _reader(self, pixels: jax.Array, *, keep: bool) -> Callable[[jax.Array], ImageFeatures]:
        """Features [B, S, ...] of frames int32[B, S].

        Kept, they are computed once and cost memory by the frame, as the backward pass does anyway.
        A network that saves memory (`remat`) still encodes a frame of a clip at a time: sixteen
        at once have 8 GiB of logits in a global block of the large one.
        """

        def frames_of(x: jax.Array, frame: jax.Array) -> jax.Array:
            return jax.vmap(lambda clip, index: clip[index])(x, frame)

        if not keep:
            return lambda frame: self.network.features(frames_of(pixels, frame))
        if self.config.remat:
            features = jax.lax.map(self.network.features, jnp.moveaxis(pixels, 1, 0))
            features = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), features)
        else:
            features = self.network.features(pixels)
        return lambda frame: jax.tree.map(lambda x: frames_of(x, frame), features)

    def _candidates(self, decoded: Decoded, name: str, asked: jax.Array) -> dict[str, jax.Array]:
        return {
            f"{name}candidates": resize_masks(decoded.masks, self.mask_size),
            f"{name}iou": decoded.iou, f"{name}presence": decoded.presence, f"{name}asked": asked,
        }  # fmt: skip

    def _prompt_error(self, tokens: jax.Array, boxes: jax.Array) -> jax.Array:
        """float32[B, S]: mean distance from the tokens of boxes [B, S, 4], xyxy in [0, 1]."""
        boxes = boxes * self.config.image_size
        wanted = jax.lax.stop_gradient(self.network.prompt_encoder.boxes(boxes))
        return jnp.mean(jnp.abs(tokens - wanted), axis=(-2, -1))


def prompt_tokens(encoder: PromptEncoder, tokens: jax.Array, inputs: HeadInputs) -> Prompt:
    """The adapter's `tokens` float32[B, S, 3, C], or what the user drew in their place: a box, some
    points, or both, in that order and with one filling behind, as published. The frame is not
    chosen yet (0).

    A single point leaves open which of the things at it is meant.
    """
    drawn = jnp.zeros(tokens.shape[:2], bool)
    if inputs.boxes is not None:
        drawn = inputs.box_valid
        boxes = encoder.boxes(inputs.boxes * encoder.image_size)
        tokens = jnp.where(drawn[..., None, None], boxes, tokens)
    start, single = jnp.zeros(drawn.shape, jnp.int32), jnp.ones(drawn.shape, bool)
    if inputs.points is None:
        return Prompt(tokens, start, single)
    labels = inputs.point_labels
    count = jnp.sum(labels != FILLING, axis=-1)
    pointed = count > 0
    tokens = tokens.at[:, :, -1].set(
        jnp.where(pointed[..., None], encoder.filling[0], tokens[:, :, -1])
    )
    points = encoder.points(inputs.points * encoder.image_size, labels)
    kept = jnp.repeat((drawn | ~pointed)[..., None], BOX_TOKENS - 1, axis=-1)
    valid = jnp.concatenate([kept, jnp.ones((*start.shape, 1), bool), labels != FILLING], axis=-1)
    single = drawn | (count != 1)
    return Prompt(jnp.concatenate([tokens, points], axis=2), start, single, valid=valid)


def best_frame(decoded: Decoded, frame_valid: jax.Array) -> jax.Array:
    """The frame int32[B, S] where presence times predicted IoU is largest; `decoded` of `stills`,
    frame_valid bool[B, F]."""
    B, S, F = decoded.presence.shape
    rows = jax.tree.map(lambda x: x.reshape(B, S * F, *x.shape[3:]), decoded)
    answer, _ = choose(rows, True)
    sure = jax.nn.sigmoid(decoded.presence) * pick(rows.iou, answer).reshape(B, S, F)
    return jnp.argmax(jnp.where(frame_valid[:, None], sure, -1.0), axis=-1)


def best_labelled_frame(
    targets: Mapping[str, jax.Array], frame_valid: jax.Array, otherwise: jax.Array
) -> jax.Array:
    """The frame int32[B, S] where most of the object is labelled, `otherwise` where nothing is."""
    area = jnp.sum(targets["masks"] > 0, axis=(-2, -1))
    area = area * (targets["labelled"] & frame_valid[:, None])
    return jnp.where(jnp.any(area > 0, axis=-1), jnp.argmax(area, axis=-1), otherwise)


def labelled_boxes(targets: Mapping[str, jax.Array], frame: jax.Array) -> jax.Array:
    """Boxes float32[B, S, 4] of the labelled masks in one frame an object, int32[B, S]; see
    `extents`."""
    masks = jnp.take_along_axis(targets["masks"], frame[..., None, None, None], axis=2)
    return extents(masks[:, :, 0])


def extents(masks: jax.Array) -> jax.Array:
    """Tight boxes float32[..., 4], xyxy in [0, 1], of masks [..., h, w]; zeros where empty."""
    sides = []
    for axis in (-2, -1):  # columns, then rows
        seen = jnp.any(masks > 0, axis=axis)
        n = seen.shape[-1]
        low, high = jnp.argmax(seen, axis=-1), n - jnp.argmax(seen[..., ::-1], axis=-1)
        sides.append(jnp.stack([low, high], axis=-1) / n * jnp.any(seen, axis=-1, keepdims=True))
    return jnp.stack(sides, axis=-1).reshape(*masks.shape[:-2], 4)
