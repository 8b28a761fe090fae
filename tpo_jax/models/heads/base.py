"""What a task head is, what it is given, and the layer that heads share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.layers import LayerNorm, Linear, Mlp, Rngs
from tpo_jax.models.vision import SelfAttention, VisionFeatures
from tpo_jax.parallel.weighted_sum import WeightedSum

# A box that the user gives: its slot is an input, filled by the box encoder.
BOX_MARKER, BOX_TOKEN = "<box>", "<track_box>"

# Under which a model keeps the tokens that its heads share, beside the heads.
FRAME_TOKENS = "frame_tokens"

# Score of a token that attention must not see: finite, so that a row without any stays finite.
_UNSEEN = -1e30

# The shortest wave of a position is 1 / 32 of the frame or the clip.
POSITION_OCTAVES = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadInputs:
    """Everything a head may read, for S slots in each of B rows.

    slot_states: float32[B, S, D], hidden state of the language model at the slot token.
    features: VisionFeatures of the row's clip, float32.
    frames: float32[B, F, H, W, 3], the clip itself, normalised.
    frame_valid: bool[B, F].
    frame: int32[B, S], frame that the slot asks about (read by the region head only).

    Only for heads with `reads_tokens`:
    tokens: float32[B, F, h1 * w1, C], of `FrameTokens`.

    Only for heads with `reads_prompt`:
    prompt: float32[B, S, R, D], hidden states of the slot's question, its video behind them.
    prompt_embeds: float32[B, S, R, D], what went into the language model there: words as such.
    prompt_valid: bool[B, S, R].
    A head with `reads_text_features` of a model whose config has text_features gets those of the
    question as prompt and prompt_valid, with R of the features, and no prompt_embeds.

    Only for heads with `reads_clip_features`, of a model whose config has clip_features:
    clip_features: float32[B, F, D], of the part of the clip that frame f stands for.

    Only where the batch has boxes that the user draws:
    boxes: float32[B, S, 4], normalised xyxy, of the slot's question; box_valid: bool[B, S];
    box_frame: int32[B, S], the frame that each is drawn on.

    Only where the user points, for heads with `reads_points`:
    points: float32[B, S, P, 2], normalised x and y; point_labels: int32[B, S, P], 1 on the object,
    0 not on it, -1 for no point; point_frame: int32[B, S], the frame that they are on.

    Only when a loss follows, so that a head can compute what nothing but its loss needs:
    targets: the slots' arrays of the batch, "valid" bool[B, S] among them.
    video_ids: uint32[B], equal for rows of one video.
    """

    slot_states: jax.Array
    features: VisionFeatures
    frames: jax.Array
    frame_valid: jax.Array
    frame: jax.Array
    tokens: jax.Array | None = None
    prompt: jax.Array | None = None
    prompt_embeds: jax.Array | None = None
    prompt_valid: jax.Array | None = None
    boxes: jax.Array | None = None
    box_valid: jax.Array | None = None
    box_frame: jax.Array | None = None
    points: jax.Array | None = None
    point_labels: jax.Array | None = None
    point_frame: jax.Array | None = None
    clip_features: jax.Array | None = None
    targets: Mapping[str, jax.Array] | None = None
    video_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What turns normalised predictions into seconds and pixels.

    start, end: bounds of the clip in seconds. times: float[F], seconds. frame_valid: bool[F].
    height, width: of the original video, pixels. frame: index of the frame asked about.
    """

    start: float
    end: float
    times: np.ndarray
    frame_valid: np.ndarray
    height: int
    width: int
    frame: int = 0


class HeadModule(Protocol):
    """An nnx.Module made as `module(config, rngs=rngs)`."""

    def __call__(self, inputs: HeadInputs) -> dict[str, jax.Array]:
        """Predictions of S slots, each float32[B, S, ...]: what `Head.loss` and `decode` read."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Registry entry.

    Data, questions and events speak of tasks; a model chooses the head that answers each.

    loss: (predictions, targets of batch["slots"][task], valid bool[B, S]) -> {term: WeightedSum}.
      Terms are "<name>/...".
    decode: (predictions of ONE slot as numpy, ClipInfo) -> JSON-able dict.
    task: what it answers, the name inside its marker; by default a task of its own, `name`.
    coupled: terms that compare rows of the whole batch; they refuse gradient accumulation.
    reads_tokens: whether it gets `HeadInputs.tokens`.
    reads_prompt: whether it gets `HeadInputs.prompt` and the two arrays that belong to it.
    reads_clip_features: whether it takes `HeadInputs.clip_features` in place of frames where the
      config of the model has them.
    reads_text_features: whether its `HeadInputs.prompt` are text features where the config of the
      model has them.
    reads_points: whether it takes `HeadInputs.points`, where the user points.
    whole_video: how `predict`, and `evaluate` where all frames are asked for, take a head that says
      something of every frame beyond the frames that the language model is shown ("": not at all).
      Its `decode` gives "masks", "times" and other lists with an entry a frame. "spread": `module`
      runs again, with other frames of the video in the places of the shown ones; "follow":
      `module` has `begin`, `go_on` and `turned` as `sam2.Sam2Head` has them
      (`generation.whole_video`).

    A head with a task of its own says what the built-in tasks have in their rooms:
    target: data.targets.SlotTarget, from the targets of an example to arrays.
    words: result of `decode` -> what stands in the text of an answer.
    score: (targets of the example, number of the marker in it, result or None where the head was
      not called) -> {"<task>/...": value}.
    """

    name: str
    marker: str
    routing_token: str
    slot_token: str
    module: Callable[..., Any]
    loss: Callable[[Mapping, Mapping, jax.Array], dict[str, WeightedSum]]
    decode: Callable[[Mapping[str, np.ndarray], ClipInfo], dict]
    task: str = ""
    coupled: frozenset[str] = frozenset()
    reads_tokens: bool = False
    reads_prompt: bool = False
    reads_clip_features: bool = False
    reads_text_features: bool = False
    reads_points: bool = False
    whole_video: str = ""
    target: Any = None
    words: Callable[[Mapping[str, Any]], str] | None = None
    score: Callable[[Mapping[str, Any], int, Mapping | None], dict[str, float]] | None = None

    def __post_init__(self):
        if not self.task:
            object.__setattr__(self, "task", self.name)
        if self.marker != f"<{self.task}>":
            raise ValueError(
                f"head {self.name!r}: marker={self.marker!r}: must be '<{self.task}>', its task"
            )
        if self.whole_video not in ("", "spread", "follow"):
            raise ValueError(
                f"head {self.name!r}: whole_video={self.whole_video!r}: must be '', 'spread' or "
                "'follow'"
            )


class SlotAttention(nnx.Module):
    """Pre-norm cross-attention of a few queries to many tokens, then an MLP; both residual.

    Keys and values are never formed: q . (t Wk) = (q Wk^T) . t, and values are projected after the
    weighted sum of tokens. The bias of k_proj adds the same number to every logit of a query and
    cancels.
    """

    def __init__(self, width: int, heads: int, *, rngs: Rngs):
        self.query_norm = LayerNorm(width)
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.o_proj = Linear(width, width, rngs=rngs)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, width, rngs=rngs)
        self.heads = heads

    def __call__(
        self, queries: jax.Array, tokens: jax.Array, valid: jax.Array | None = None
    ) -> jax.Array:
        """float32[rows, S, C], float32[rows, T, C], bool[rows, T] -> float32[rows, S, C]."""
        rows, S, C = queries.shape
        H = C // self.heads
        q = self.q_proj(self.query_norm(queries)).reshape(rows, S, self.heads, H)
        to_keys = self.k_proj.merged_kernel.reshape(C, self.heads, H)
        to_values = self.v_proj.merged_kernel.reshape(C, self.heads, H)
        q = jnp.einsum("bsnh,cnh->bsnc", q * H**-0.5, to_keys).reshape(rows, -1, C)
        scores = jnp.einsum("bqc,btc->bqt", q, tokens)
        if valid is not None:
            scores = jnp.where(valid[:, None], scores, _UNSEEN)
        weights = jax.nn.softmax(scores, axis=-1)
        pooled = jnp.einsum("bqt,btc->bqc", weights, tokens).reshape(rows, S, self.heads, C)
        mixed = jnp.einsum("bsnc,cnh->bsnh", pooled, to_values).reshape(rows, S, C)
        x = queries + self.o_proj(mixed + self.v_proj.bias[...])
        return x + self.mlp(self.mlp_norm(x))


class SlotQuery(nnx.Module):
    """What a slot looks for: its state, and the words of its question that it attends to.

    The state alone would do in the end, but the language model has to learn first to carry the
    whole question to the slot, and its last states say what comes next rather than what was said.
    Until then a head that sees nothing else does not learn which thing is meant.
    """

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        width, given = config.head.width, config.language.width
        self.slot_mlp = Mlp(given, 2 * width, width, rngs=rngs)
        self.embed_norm = LayerNorm(given)
        self.word_proj = Linear(given, width, rngs=rngs)
        self.word_norm = LayerNorm(width)
        self.reading = SlotAttention(width, config.head.heads, rngs=rngs)

    def __call__(self, inputs: HeadInputs) -> jax.Array:
        """-> float32[B, S, C]; ValueError without the words of the question."""
        if inputs.prompt is None or inputs.prompt_embeds is None:
            raise ValueError(
                "HeadInputs.prompt or prompt_embeds is missing; region and mask head read the "
                "question: pass what VideoLanguageModel.prompts gives"
            )
        B, S, R, _ = inputs.prompt.shape
        words = self.word_proj(inputs.prompt + self.embed_norm(inputs.prompt_embeds))
        words = self.word_norm(words).reshape(B * S, R, -1)
        slots = self.slot_mlp(inputs.slot_states).reshape(B * S, 1, -1)
        valid = inputs.prompt_valid.reshape(B * S, R)
        return self.reading(slots, words, valid).reshape(B, S, -1)


class FrameTokens(nnx.Module):
    """One fine token grid a frame: stem features, up-sampled patch features and a position.

    A model has one, made and trained for all of its heads together: what one head learns to tell
    apart, the others find. What a slot looks for is matched against these tokens, so they start out
    telling colours and places apart: positions are few smooth waves, not a vector of its own for
    every cell, which would drown the picture.
    """

    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        vision, width = config.vision, config.head.width
        self.stem_proj = Linear(vision.stem_widths[0], width, rngs=rngs)
        self.patch_proj = Linear(vision.width, width, rngs=rngs)
        self.position_proj = Linear(4 * POSITION_OCTAVES, width, rngs=rngs)
        self.norm = LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, width, rngs=rngs)
        self.final_norm = LayerNorm(width)
        self.repeats = vision.stem_grid // vision.grid

    def __call__(self, features: VisionFeatures) -> jax.Array:
        """float32[B, F, ...] -> float32[B, F, h1 * w1, C]."""
        fine, coarse = self.stem_proj(features.stem), self.patch_proj(features.patches)
        coarse = jnp.repeat(jnp.repeat(coarse, self.repeats, axis=2), self.repeats, axis=3)
        B, F, h1, w1, C = fine.shape
        position = self.position_proj(position_waves(cell_centres(h1, w1)))
        x = self.norm((fine + coarse).reshape(B, F, h1 * w1, C) + position)
        return self.final_norm(x + self.mlp(x))


def cell_centres(rows: int, columns: int) -> jax.Array:
    """float32[rows * columns, 2]: x, y of every cell's centre in [0, 1], rows first."""
    y, x = jnp.meshgrid(
        (jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns, indexing="ij"
    )
    return jnp.stack([x, y], axis=-1).reshape(rows * columns, 2)


def cells_inside(boxes: jax.Array, rows: int, columns: int) -> jax.Array:
    """Normalised xyxy float32[..., 4] -> float32[..., rows * columns]: equal shares, sum 1.

    Cells whose centre is inside; of a box that holds no centre, the cell nearest to its middle.
    """
    places, boxes = cell_centres(rows, columns), boxes[..., None, :]
    inside = jnp.all((boxes[..., :2] <= places) & (places <= boxes[..., 2:]), axis=-1)
    gap = jnp.sum((places - (boxes[..., :2] + boxes[..., 2:]) / 2) ** 2, axis=-1)
    nearest = jax.nn.one_hot(jnp.argmin(gap, axis=-1), rows * columns)
    count = jnp.sum(inside, axis=-1, keepdims=True)
    return jnp.where(count > 0, inside / jnp.maximum(count, 1), nearest)


def frame_centres(frame_valid: jax.Array) -> jax.Array:
    """bool[B, F] -> float32[B, F]: where frames stand in their clip, in [0, 1] where valid.

    Frame i of n valid frames is taken to stand at (i + 1/2) / n, which is what mid-of-interval
    sampling does.
    """
    count = jnp.maximum(jnp.sum(frame_valid, axis=-1, keepdims=True), 1)
    return (jnp.arange(frame_valid.shape[-1], dtype=jnp.float32) + 0.5) / count


def position_waves(positions: jax.Array) -> jax.Array:
    """float32[..., n] in [0, 1] -> float32[..., n * 2 * POSITION_OCTAVES], sines then cosines.

    Fourier features of octaves, as in NeRF (Mildenhall et al. 2020, 2003.08934).
    """
    angles = positions[..., None] * jnp.pi * 2.0 ** jnp.arange(POSITION_OCTAVES)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*positions.shape[:-1], -1)


class FrameMixer(nnx.Module):
    """Pre-norm self-attention of a slot over the frames of its clip, then an MLP; both residual."""

    def __init__(self, width: int, heads: int, *, rngs: Rngs):
        self.attention_norm = LayerNorm(width)
        self.attention = SelfAttention(width, heads, rngs=rngs)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, 2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, frame_valid: jax.Array) -> jax.Array:
        """float32[B, S, F, C], bool[B, F] -> float32[B, S, F, C]; padded frames are not seen."""
        B, S, F, C = x.shape
        rows = self.attention_norm(x).reshape(B * S, F, C)
        mixed = self.attention(rows, jnp.repeat(frame_valid, S, axis=0))
        x = x + mixed.reshape(x.shape)
        return x + self.mlp(self.mlp_norm(x))
