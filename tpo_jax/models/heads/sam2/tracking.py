"""Objects through a video with SAM 2: from the prompted frame to the end, then back to the start.

Every object has its own prompted frame, so every object reads the frames in its own order, one a
step. What is carried from step to step does not grow: the memories of the last few frames and the
pointers of some more, each in a ring; the prompted frame's never leave. Going back starts with
empty rings.

`track` has the whole clip at hand. `begin`, `go_on` and `turned` follow the same objects through a
video of any length that comes in windows, all objects in one pass forward and one back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tpo_jax.models.heads.sam2.image_encoder import ImageFeatures
from tpo_jax.models.heads.sam2.layers import resize_masks
from tpo_jax.models.heads.sam2.mask_decoder import Decoded, choose, pick
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.heads.sam2.prompt_encoder import FILLING
from tpo_jax.models.layers import checkpointed

# Logits of a given mask inside and outside.
_GIVEN, _GIVEN_NOT = 10.0, -10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """What says which object is meant, for S objects of each of B videos.

    tokens: float32[B, S, n, C], of the prompt encoder or of an adapter.
    frame: int32[B, S], the frame that is prompted.
    single: bool[B, S], whether it leaves nothing open, as a box or several points do.
    masks: float32[B, S, H, W] in {0, 1} at image_size; where given, they are what is tracked and
      `tokens` are not read.
    valid: bool[B, S, n], tokens that are there; None: all.
    """

    tokens: jax.Array
    frame: jax.Array
    single: jax.Array
    masks: jax.Array | None = None
    valid: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracked:
    """masks: float32[B, S, F, m, m], logits of the answered mask. presence: float32[B, S, F].
    decoded: all four masks of every frame, [B, S, F, ...] each, if they were asked for."""

    masks: jax.Array
    presence: jax.Array
    decoded: Decoded | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Memory:
    """What a frame leaves behind: cells bfloat16[B, S, ..., hw, Cm], pointer
    float32[B, S, ..., C]."""

    cells: jax.Array
    pointer: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rings:
    """Entry i was written at the last step whose number is i modulo the ring's length.

    cells: bfloat16[B, S, n, hw, Cm]; pointers: float32[B, S, m, C]; valid: bool[B, S, n or m].
    """

    cells: jax.Array
    cells_valid: jax.Array
    pointers: jax.Array
    pointers_valid: jax.Array


def track(
    sam: Sam2,
    read: Callable[[jax.Array], ImageFeatures],
    prompt: Prompt,
    frames: int,
    count: jax.Array | int,
    *,
    keep: bool = False,
) -> Tracked:
    """Masks of every object in every frame.

    Args:
      read: features [B, S or 1, ...] of the frames int32[B, S]. It is called inside the loop: if
        it encodes images, no more than one frame's features exist at a time.
      frames: F, static, fillings at the end included.
      count: int32[] or int32[B], frames that are there.
      keep: whether to return all four masks.
    """
    start = prompt.frame
    features = read(start)
    first, memory = _prompted(sam, features, prompt)
    rings = _empty_rings(sam, memory)

    def body(rings: _Rings, step: jax.Array) -> tuple[_Rings, Tracked]:
        # Steps 0 .. F - 1 - start go on from the prompted frame, the others back from it.
        frame = jnp.where(step < frames - start, start + step, frames - 1 - step)
        rings = _emptied(rings, step == frames - start)
        features = read(frame)
        top = _remembering(sam, features, memory, rings, step, jnp.abs(frame - start), count)
        decoded, new = _found(sam, features, top)
        output = _answer(decoded, jnp.zeros_like(prompt.single), keep)
        return _written(rings, new, step), output

    body = checkpointed(body, sam.config.remat)
    _, rest = jax.lax.scan(body, rings, jnp.arange(1, frames))
    steps = jax.tree.map(
        lambda x, rest: jnp.concatenate([x[None], rest]), _answer(first, prompt.single, keep), rest
    )
    # Frame t was read at step t - start, or behind the turn.
    t = jnp.arange(frames)[:, None, None]
    step = jnp.where(t >= start, t - start, frames - 1 - t)

    def in_order(x: jax.Array) -> jax.Array:
        index = step.reshape(*step.shape, *[1] * (x.ndim - 3))
        return jnp.moveaxis(jnp.take_along_axis(x, index, axis=0), 0, 2)

    ordered = jax.tree.map(in_order, steps)
    if prompt.masks is None:
        return ordered
    given = (jnp.arange(frames) == start[..., None])[..., None, None]
    masks = _given_logits(prompt.masks, sam.config.mask_size)[:, :, None]
    present = jnp.any(prompt.masks > 0, axis=(-2, -1))[..., None]
    presence = jnp.where(present, _GIVEN, _GIVEN_NOT)
    return dataclasses.replace(
        ordered, masks=jnp.where(given, masks, ordered.masks),
        presence=jnp.where(given[..., 0, 0], presence, ordered.presence),
    )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Followed:
    """What is carried through a video that comes in windows; its size does not depend on them.

    memory: of the prompted frames. rings: of the frames since. step: int32[], number that the next
    frame has, 1 where a pass begins.
    """

    memory: _Memory
    rings: _Rings
    step: jax.Array


def begin(sam: Sam2, features: ImageFeatures, prompt: Prompt) -> tuple[Tracked, Followed]:
    """The prompted frames by themselves, [B, S, 1, ...], and what is carried on from them.

    Args:
      features: [B, S, ...], of the prompted frame of each object.
    """
    decoded, memory = _prompted(sam, features, prompt)
    found = _answer(decoded, prompt.single, keep=False)
    found = jax.tree.map(lambda x: x[:, :, None], found)
    return found, Followed(memory, _empty_rings(sam, memory), jnp.ones((), jnp.int32))


def turned(followed: Followed) -> Followed:
    """As it was before the first frame, for the pass back."""
    everything = jnp.ones(followed.rings.cells_valid.shape[:2], bool)
    return Followed(
        followed.memory, _emptied(followed.rings, everything), jnp.ones((), jnp.int32)
    )


def go_on(
    sam: Sam2,
    read: Callable[[jax.Array], ImageFeatures],
    followed: Followed,
    start: jax.Array,
    frames: tuple[jax.Array, jax.Array],
    count: jax.Array,
    direction: jax.Array,
) -> tuple[Followed, Tracked]:
    """Objects through the next W frames of a pass; [B, S, W, ...].

    An object enters the pass behind its prompted frame; what is said of frames before says nothing.

    Args:
      read: features [B, 1, ...] of frame int32[] of the window.
      start: int32[B, S], number in the video of each object's prompted frame.
      frames: int32[W], numbers in the video, and bool[W], False for fillings at the end.
      count: int32[], frames of the video.
      direction: int32[], 1 forward and -1 back.
    """

    def body(
        followed: Followed, given: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[Followed, Tracked]:
        place, frame, there = given
        features = read(place)
        distance = direction * (frame - start)
        top = _remembering(
            sam, features, followed.memory, followed.rings, followed.step, jnp.abs(distance), count
        )
        decoded, new = _found(sam, features, top)
        rings = _written(followed.rings, new, followed.step, distance > 0)
        after = Followed(followed.memory, rings, followed.step + 1)
        after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, followed)
        return after, _answer(decoded, jnp.zeros(start.shape, bool), keep=False)

    places = jnp.arange(len(frames[0]))
    followed, found = jax.lax.scan(body, followed, (places, *frames))
    return followed, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


def stills(
    sam: Sam2,
    read: Callable[[jax.Array], ImageFeatures],
    prompt: jax.Array,
    frames: int,
    prompt_valid: jax.Array | None = None,
) -> Decoded:
    """Every frame by itself as if it were the prompted one.

    Args:
      prompt: float32[B, S, n, C].
      prompt_valid: bool[B, S, n], tokens that are there; None: all.

    Returns: [B, S, F, ...] each.
    """

    def body(_: None, frame: jax.Array) -> tuple[None, Decoded]:
        features = read(jnp.full(prompt.shape[:2], frame, jnp.int32))
        return None, sam.decode(
            features.top + sam.no_memory[0, 0], features, prompt, prompt_valid=prompt_valid
        )

    body = checkpointed(body, sam.config.remat)
    _, decoded = jax.lax.scan(body, None, jnp.arange(frames))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), decoded)


def _answer(decoded: Decoded, single: jax.Array, keep: bool) -> Tracked:
    answer, _ = choose(decoded, single)
    return Tracked(pick(decoded.masks, answer), decoded.presence, decoded if keep else None)


def _prompted(sam: Sam2, features: ImageFeatures, prompt: Prompt) -> tuple[Decoded, _Memory]:
    """The prompted frame, which reads no memory."""
    if prompt.masks is not None:
        return _given(sam, features, prompt)
    decoded = sam.decode(
        features.top + sam.no_memory[0, 0], features, prompt.tokens, prompt_valid=prompt.valid
    )
    present = decoded.presence > 0
    answer, told = choose(decoded, prompt.single)
    cells = sam.remember(features.top, pick(decoded.masks, answer), present, binary=True)
    return decoded, _Memory(cells, sam.pointer(pick(decoded.tokens, told), present))


def _given(sam: Sam2, features: ImageFeatures, prompt: Prompt) -> tuple[Decoded, _Memory]:
    """A prompted mask is the answer; the decoder only makes its pointer."""
    masks = prompt.masks
    present = jnp.any(masks > 0, axis=(-2, -1))
    logits = sam.mask_downsample(masks[..., None])[..., 0]
    decoded = sam.decode(features.top, features, _nothing(sam, present.shape), logits)
    _, told = choose(decoded, False)
    seen = present & (decoded.presence > 0)
    pointer = sam.pointer(pick(decoded.tokens, told), seen)
    cells = sam.remember(features.top, jnp.where(masks > 0.5, 1.0, -1.0), present, binary=True)
    return decoded, _Memory(cells, pointer)


def _given_logits(masks: jax.Array, size: int) -> jax.Array:
    logits = masks * (_GIVEN - _GIVEN_NOT) + _GIVEN_NOT
    return resize_masks(logits, size, antialias=True)


def _nothing(sam: Sam2, shape: tuple[int, int]) -> jax.Array:
    """Prompt tokens float32[B, S, 2, C] of a frame that nobody points at."""
    labels = jnp.full((*shape, 2), FILLING, jnp.int32)
    return sam.prompt_encoder.points(jnp.zeros((*labels.shape, 2)), labels)


def _found(sam: Sam2, features: ImageFeatures, top: jax.Array) -> tuple[Decoded, _Memory]:
    """A frame with memory in its cells, that nobody points at."""
    decoded = sam.decode(top, features, _nothing(sam, top.shape[:2]))
    present = decoded.presence > 0
    answer, told = choose(decoded, False)
    cells = sam.remember(features.top, pick(decoded.masks, answer), present, binary=False)
    return decoded, _Memory(cells, sam.pointer(pick(decoded.tokens, told), present))


def _remembering(
    sam: Sam2,
    features: ImageFeatures,
    prompted: _Memory,
    rings: _Rings,
    step: jax.Array,
    distance: jax.Array,
    count: jax.Array | int,
) -> jax.Array:
    """Cells float32[B, S, h, w, C] of a frame that has read the rings and the prompted frame.

    Args:
      distance: int32[B, S], frames from here to the prompted one.
    """
    valid = jnp.ones((*distance.shape, 1), bool)
    ages = _ages(step, rings.cells.shape[2])
    # The longest distance that the published model scales by.
    longest = jnp.maximum(jnp.minimum(count, sam.config.pointers) - 1, 1)
    past = _ages(step, rings.pointers.shape[2])
    past = jnp.broadcast_to(past, rings.pointers_valid.shape)
    distances = jnp.concatenate([distance[..., None], past], axis=-1)
    return sam.read_memory(
        features.top,
        jnp.concatenate([prompted.cells[:, :, None], rings.cells], axis=2),
        jnp.concatenate([jnp.zeros(1, jnp.int32), ages]),
        jnp.concatenate([valid, rings.cells_valid], axis=-1),
        jnp.concatenate([prompted.pointer[:, :, None], rings.pointers], axis=2),
        distances / jnp.reshape(longest, (-1, 1, 1)),
        jnp.concatenate([valid, rings.pointers_valid], axis=-1),
    )


def _empty_rings(sam: Sam2, memory: _Memory) -> _Rings:
    n, m = sam.config.memories - 1, sam.config.pointers - 1
    (B, S, *cells), (*_, C) = memory.cells.shape, memory.pointer.shape
    return _Rings(
        jnp.zeros((B, S, n, *cells), memory.cells.dtype), jnp.zeros((B, S, n), bool),
        jnp.zeros((B, S, m, C), jnp.float32), jnp.zeros((B, S, m), bool),
    )  # fmt: skip


def _ages(step: jax.Array, length: int) -> jax.Array:
    """int32[length]: steps since each entry of a ring was written, 1 for the last."""
    return (step - 1 - jnp.arange(length)) % length + 1


def _emptied(rings: _Rings, turned: jax.Array) -> _Rings:
    """Rings of which the objects bool[B, S] have forgotten everything."""
    kept = ~turned[..., None]
    return dataclasses.replace(
        rings, cells_valid=rings.cells_valid & kept, pointers_valid=rings.pointers_valid & kept
    )


def _written(
    rings: _Rings, new: _Memory, step: jax.Array, seen: jax.Array | None = None
) -> _Rings:
    """Rings with the memory of a step in the place of the oldest; it counts for objects `seen`
    bool[B, S], by default for all."""

    def put(ring: jax.Array, value: jax.Array) -> jax.Array:
        place = step % ring.shape[2]
        return jax.lax.dynamic_update_index_in_dim(ring, value, place, axis=2)

    if seen is None:
        seen = jnp.ones(rings.cells_valid.shape[:2], bool)
    return _Rings(
        put(rings.cells, new.cells), put(rings.cells_valid, seen),
        put(rings.pointers, new.pointer), put(rings.pointers_valid, seen),
    )  # fmt: skip
