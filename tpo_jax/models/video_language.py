"""The whole model: video encoder, connector, language model, task tokens and heads.

`FunctionalModel` is what trainers and samplers hold: a pure function of a dict of parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tpo_jax.errors import UserError
from tpo_jax.models import lora
from tpo_jax.models.config import ConnectorConfig, ModelConfig
from tpo_jax.models.connector import Connector
from tpo_jax.models.connectors.registry import make_connector
from tpo_jax.models.heads import BOX_TOKEN, HeadInputs, head, heads_of, tokens_of
from tpo_jax.models.heads.base import FRAME_TOKENS, FrameTokens
from tpo_jax.models.language import KVCache, LanguageModel
from tpo_jax.models.layers import Mlp, Rngs, fold_rows, gelu
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.registry import make_tower, normalise_pixels
from tpo_jax.models.vision import VisionEncoder, VisionFeatures
from tpo_jax.parallel.context import AXIS, context_devices, per_device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """One encoded clip a row.

    visual: float[B, Vt, D], tokens for the prefix. features: what heads read; None where
    `encode_batch` found no head.
    """

    visual: jax.Array
    features: VisionFeatures | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """branch_hidden float[B, K, R, D], prefix_hidden float[B, P, D]; after the final norm."""

    branch_hidden: jax.Array
    prefix_hidden: jax.Array
    encoded: Encoded


class VideoLanguageModel(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: Rngs):
        self.config = config
        width = config.language.width
        published = isinstance(config.vision, TowerConfig)
        self.vision = (make_tower if published else VisionEncoder)(config.vision, rngs=rngs)
        own = isinstance(config.connector, ConnectorConfig)
        connector = Connector if own else make_connector
        self.connector = connector(config.connector, config.vision.width, width, rngs=rngs)
        self.language = LanguageModel(config.language, rngs=rngs)
        if config.heads:

            def vector() -> nnx.Param:
                draw = jax.random.normal(rngs.params(), (width,), jnp.float32)
                return nnx.Param(draw * width**-0.5)

            self.task_tokens = nnx.Dict({head(name).task: vector() for name in config.heads})
            published = config.box_encoder == "tpo"
            self.box_encoder = Mlp(
                4, width // 2 if published else width, width, rngs=rngs, scale=width**-0.5,
                activation=jax.nn.relu if published else gelu,
            )  # fmt: skip
            self.heads = nnx.Dict(
                {name: head(name).module(config, rngs=rngs) for name in config.heads}
            )
            if any(head(name).reads_tokens for name in config.heads):
                self.heads[FRAME_TOKENS] = FrameTokens(config, rngs=rngs)
        if config.lora is not None:
            lora.attach(self, config.lora, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def encode(
        self, frames: jax.Array, frame_valid: jax.Array, frame_times: jax.Array
    ) -> Encoded:
        """Encoded clips. An image is a clip of one frame.

        Args:
          frames: uint8[B, F, H, W, 3].
          frame_valid: bool[B, F].
          frame_times: float32[B, F], seconds.
        """
        features = self._see(frames, frame_valid)
        if isinstance(self.config.connector, ConnectorConfig):
            return Encoded(self.connector(features.patches, frame_times), features)
        return Encoded(self.connector(features, frame_valid), features)

    def _see(self, frames: jax.Array, frame_valid: jax.Array) -> VisionFeatures:
        """The vision encoder; frames that do not see each other are split over `context`."""
        config, dtype = self.config.vision, self.dtype
        structure, parameters = nnx.split(self.vision)

        def local(
            parameters: nnx.State, frames: jax.Array, frame_valid: jax.Array
        ) -> VisionFeatures:
            if isinstance(config, TowerConfig):
                pixels = normalise_pixels(config, frames)
            else:
                pixels = normalise(frames)
            return nnx.merge(structure, parameters)(pixels.astype(dtype), frame_valid)

        devices = context_devices()
        if devices == 1 or not config.per_frame or frames.shape[1] % devices:
            return local(parameters, frames, frame_valid)
        whole, split = PartitionSpec(), PartitionSpec(None, AXIS)
        args = (parameters, frames, frame_valid)
        return per_device(local, args, (whole, split, split), split)

    def encode_batch(self, batch: Mapping[str, Any]) -> Encoded:
        """`encode` of a batch; images that it brings in tiles give the tokens of their tiles, and
        heads the features of the whole image.

        Without heads there are no features: as a result of a program they would be computed and
        kept. So UniRes, which makes no token of the whole image, does not run the tower on it.
        """
        clip, heads = (batch["frames"], batch["frame_valid"]), bool(self.config.heads)
        if "tiles" not in batch:
            encoded = self.encode(*clip, batch["frame_times"])
            return encoded if heads else Encoded(encoded.visual, None)
        whole = self._see(*clip) if heads or self.connector.shows_whole else None
        tiles = self._see(batch["tiles"], jnp.ones(batch["tiles"].shape[:2], bool))
        visual = self.connector.tiles(whole, tiles, batch["tile_index"], batch["tile_weight"])
        return Encoded(visual, whole if heads else None)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32[...] -> float[..., D]; slot tokens of heads give the head's task vector."""
        embeds = self.language.embed_tokens(tokens)
        for name in self.config.heads:
            is_slot = tokens == self.config.tokens[head(name).slot_token]
            vector = self.task_tokens[head(name).task][...]
            embeds = jnp.where(is_slot[..., None], vector, embeds)
        return embeds.astype(self.dtype)

    def encode_boxes(self, boxes: jax.Array) -> jax.Array:
        """float32[..., 4] normalised xyxy -> float[..., D], what a user's box is to the decoder."""
        return self.box_encoder(boxes.astype(jnp.float32)).astype(self.dtype)

    def embed_prefix(self, tokens: jax.Array, visual: jax.Array) -> jax.Array:
        """int32[B, P], float[B, Vt, D] -> float[B, P, D], visual tokens at config.visual_offset."""
        P, offset, span = tokens.shape[1], self.config.visual_offset, visual.shape[1]
        if offset + span > P:
            raise ValueError(
                f"prefix of {P} tokens is too short for {span} visual tokens at offset {offset}; "
                f"it needs at least {offset + span}"
            )
        # Of text alone: nothing is looked up, sent or added to a gradient for the visual positions.
        text = jnp.concatenate([tokens[:, :offset], tokens[:, offset + span:]], axis=1)
        embeds = self.embed_tokens(text)
        return jnp.concatenate(
            [embeds[:, :offset], visual.astype(embeds.dtype), embeds[:, offset:]], axis=1
        )

    def embed_branches(self, tokens: jax.Array, slots: Mapping[str, Mapping]) -> jax.Array:
        """int32[B, K, R] -> float[B, K, R, D]; slots["box"] fills the user's boxes in."""
        embeds = self.embed_tokens(tokens)
        if "box" not in slots:
            return embeds
        box = slots["box"]
        rows = jnp.arange(tokens.shape[0])[:, None]
        # Slots that are not valid are sent out of range, where a scatter drops them.
        branch = jnp.where(box["valid"], box["branch"], tokens.shape[1])
        vectors = self.encode_boxes(box["boxes"]).astype(embeds.dtype)
        return embeds.at[rows, branch, box["index"]].set(vectors, mode="drop")

    def __call__(self, batch: Mapping[str, Any], keys: jax.Array | None = None) -> Outputs:
        """Teacher-forced forward pass.

        Args:
          batch: the data pipeline's dict (frames, frame_valid, frame_times, prefix_*, branch_*,
            slots; tiles, tile_* of images in tiles).
          keys: key array [B], one a row, for dropout; None for none.
        """
        encoded = self.encode_batch(batch)
        prefix = self.embed_prefix(batch["prefix_tokens"], encoded.visual)
        branches = self.embed_branches(batch["branch_tokens"], batch["slots"])
        prefix_hidden, branch_hidden = self.language(
            (prefix, batch["prefix_positions"], batch["prefix_segments"]),
            (branches, batch["branch_positions"], batch["branch_segments"]),
            None if keys is None else (keys, branch_keys(keys, branches.shape[1])),
        )
        return Outputs(branch_hidden, prefix_hidden, encoded)

    def slot_states(self, outputs: Outputs, slots: Mapping[str, jax.Array]) -> jax.Array:
        """Hidden states float32[B, S, D] at the slots' (branch, index), both int32[B, S]."""
        hidden = outputs.branch_hidden
        rows = jnp.arange(hidden.shape[0])[:, None]
        return hidden[rows, slots["branch"], slots["index"]].astype(jnp.float32)

    def prompts(
        self, outputs: Outputs, batch: Mapping[str, Any], slots: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Entries of `HeadInputs` about the question of each slot, which ends at its answer.

        Returns: "prompt" float[B, S, R, D], "prompt_embeds" float[B, S, R, D], "prompt_valid"
          bool[B, S, R].
        """
        rows = jnp.arange(outputs.branch_hidden.shape[0])[:, None]
        branch = slots["branch"]
        # The last token of the prompt is the one that the first answer token is predicted from.
        last = batch["answer_positions"][rows, branch][..., :1]
        used = batch["branch_segments"][rows, branch] > 0
        embeds = self.embed_branches(batch["branch_tokens"], batch["slots"])
        return {
            "prompt": outputs.branch_hidden[rows, branch],
            "prompt_embeds": embeds[rows, branch],
            "prompt_valid": used & (jnp.arange(used.shape[-1]) <= last),
        }

    def reads_texts(self, name: str) -> bool:
        """Whether a head gets text features as its prompt."""
        return self.config.text_features is not None and head(name).reads_text_features

    def texts(
        self, batch: Mapping[str, Any], slots: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """`prompts` of text features: those of the question of each slot.

        Returns: "prompt" float32[B, S, tokens, width], "prompt_valid" bool[B, S, tokens].
        """
        rows = jnp.arange(batch["text_features"].shape[0])[:, None]
        names = {"prompt": "text_features", "prompt_valid": "text_valid"}
        return {entry: batch[name][rows, slots["branch"]] for entry, name in names.items()}

    def drawn_boxes(
        self, batch: Mapping[str, Any], slots: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Entries of `HeadInputs` about the user's box of each slot.

        The slots of an answer take the boxes of their question in turn, and the last one when there
        are no more: "<mask> and <mask>" to "Follow <box> and <box>.", all to a single box.

        Args:
          slots: "branch" and "order" int32[B, S], as of `order_in_branch`.

        Returns: "boxes" float[B, S, 4] normalised xyxy, "box_valid" bool[B, S], "box_frame"
          int32[B, S].
        """
        box = batch["slots"]["box"]
        same = box["valid"][:, None] & (box["branch"][:, None] == slots["branch"][..., None])
        last = jnp.sum(same, axis=-1) - 1
        order = order_in_branch(box["branch"], box["valid"])
        own = same & (order[:, None] == jnp.minimum(slots["order"], last)[..., None])
        chosen = jnp.argmax(own, axis=-1)
        return {
            "boxes": jnp.take_along_axis(box["boxes"], chosen[..., None], axis=1),
            "box_valid": jnp.any(same, axis=-1),
            "box_frame": jnp.take_along_axis(box["frame"], chosen, axis=1),
        }

    def run_heads(
        self, outputs: Outputs, batch: Mapping[str, Any], *, for_losses: bool = True
    ) -> dict[str, dict]:
        """Predictions {head: {...}} of every head of the model that the batch has slots for; a head
        with slot arrays of length 0 does not run.

        Args:
          for_losses: whether heads also compute what only their losses read.
        """
        predictions, tokens = {}, None
        for name in self.config.heads:
            if head(name).task not in batch["slots"]:
                continue
            slots = batch["slots"][head(name).task]
            if not slots["valid"].shape[1]:
                continue  # idle in this bucket
            more = {}
            if head(name).reads_tokens:
                tokens = self.tokenise(outputs.encoded.features) if tokens is None else tokens
                more["tokens"] = tokens
            if self.reads_texts(name):
                more |= self.texts(batch, slots)
            elif head(name).reads_prompt:
                more |= self.prompts(outputs, batch, slots)
            if head(name).reads_clip_features:
                more["clip_features"] = batch.get("clip_features")
            if "box" in batch["slots"]:
                order = order_in_branch(slots["branch"], slots["valid"])
                more |= self.drawn_boxes(batch, {"branch": slots["branch"], "order": order})
            if for_losses:
                more |= {"targets": slots, "video_ids": batch.get("video_ids")}
            predictions[name] = self.run_head(
                name, self.slot_states(outputs, slots), outputs.encoded.features,
                batch["frames"], batch["frame_valid"], slots.get("frame"), **more,
            )  # fmt: skip
        return predictions

    def tokenise(self, features: VisionFeatures) -> jax.Array:
        """Tokens float32[B, F, h1 * w1, C] for all heads with `reads_tokens`."""
        return self.heads[FRAME_TOKENS](as_float32(features))

    def run_head(self, name: str, *args: Any, **more: Any) -> dict[str, jax.Array]:
        """One head on slots; arguments of `head_inputs`."""
        return self.heads[name](self.head_inputs(name, *args, **more))

    def head_inputs(
        self,
        name: str,
        slot_states: jax.Array,
        features: VisionFeatures,
        frames: jax.Array,
        frame_valid: jax.Array,
        frame: jax.Array | None = None,
        *,
        tokens: jax.Array | None = None,
        prompt: jax.Array | None = None,
        prompt_embeds: jax.Array | None = None,
        prompt_valid: jax.Array | None = None,
        boxes: jax.Array | None = None,
        box_valid: jax.Array | None = None,
        box_frame: jax.Array | None = None,
        points: jax.Array | None = None,
        point_labels: jax.Array | None = None,
        point_frame: jax.Array | None = None,
        clip_features: jax.Array | None = None,
        targets: Mapping[str, jax.Array] | None = None,
        video_ids: jax.Array | None = None,
    ) -> HeadInputs:
        """What a head reads of slots.

        Args:
          slot_states: float32[B, S, D].
          features: of `encode`.
          frames: uint8[B, F, H, W, 3]; frame_valid: bool[B, F].
          frame: int32[B, S], frame asked about; None is the first.
          tokens: of `tokenise`; None computes them, where the head reads them.
          prompt, prompt_embeds, prompt_valid, boxes, box_valid, box_frame, points, point_labels,
            point_frame, clip_features, targets, video_ids: see `HeadInputs`.
        """
        if frame is None:
            frame = jnp.zeros(slot_states.shape[:2], jnp.int32)
        if tokens is None and head(name).reads_tokens:
            tokens = self.tokenise(features)
        if prompt is not None:
            prompt = prompt.astype(jnp.float32)
        if prompt_embeds is not None:
            prompt_embeds = prompt_embeds.astype(jnp.float32)
        return HeadInputs(
            slot_states.astype(jnp.float32), as_float32(features), normalise(frames), frame_valid,
            frame, tokens, prompt, prompt_embeds, prompt_valid, boxes, box_valid,
            box_frame, points, point_labels, point_frame, clip_features, targets, video_ids,
        )  # fmt: skip


def order_in_branch(branch: jax.Array, valid: jax.Array) -> jax.Array:
    """int32[B, S]: how many valid slots before a slot are in its branch; of branch int32[B, S] and
    valid bool[B, S]."""
    S = branch.shape[1]
    before = jnp.arange(S) < jnp.arange(S)[:, None]
    same = (branch[:, None] == branch[..., None]) & valid[:, None]
    return jnp.sum(same & before, axis=-1, dtype=jnp.int32)


def as_float32(features: VisionFeatures) -> VisionFeatures:
    """Heads are float32 whatever the towers are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), features)


def normalise(frames: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1] (mean and deviation 0.5)."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def branch_keys(keys: jax.Array | None, branches: int) -> jax.Array | None:
    """Key array [B] -> [B, K]: branch k folds k into its row's key."""
    if keys is None:
        return None
    wide = jnp.broadcast_to(keys[:, None], (keys.shape[0], branches))
    return fold_rows(wide, jnp.broadcast_to(jnp.arange(branches), wide.shape))


class FunctionalModel:
    """A model as a pure function of its parameters, a nested dict with "/"-joinable string keys.

    model = FunctionalModel(config); params = model.init(key); outputs = model.bind(params)(batch).
    """

    def __init__(self, config: ModelConfig):
        heads_of(config.heads)  # refuses two heads of one task
        for kind in ("clip_features", "text_features"):
            given = getattr(config, kind)
            if given and not any(getattr(head(name), f"reads_{kind}") for name in config.heads):
                raise UserError(
                    f"model config: {kind}={given}: none of heads={config.heads} reads them; add "
                    "the head cg_detr, or leave them out"
                )
        missing = [token for token in tokens_of(config.heads) if token not in config.tokens]
        if missing:
            raise UserError(
                f"model config: tokens={dict(config.tokens)} lacks the ids of {missing}, which "
                f"heads={config.heads} need; add them to the tokenizer and to config.tokens"
            )
        self.config = config
        self._structure, state = nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))
        self._abstract = nnx.to_pure_dict(state)

    def _build(self, key: jax.Array) -> VideoLanguageModel:
        return VideoLanguageModel(self.config, rngs=Rngs(key))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Freshly drawn parameters, nested dict of float32[...], from key[]. Jit-able (with
        out_shardings for a large model)."""
        return nnx.to_pure_dict(nnx.state(self._build(key)))

    def abstract(self) -> dict[str, Any]:
        """The same tree of jax.ShapeDtypeStruct."""
        return jax.tree.map(lambda x: x, self._abstract)

    def bind(self, params: Mapping[str, Any]) -> VideoLanguageModel:
        """The module with these parameters; use it inside jit.

        Raises: ValueError naming leaves that are missing, unexpected or of another shape.
        """
        self._check(params)
        state = nnx.State(jax.tree.map(nnx.Param, dict(params)))
        return nnx.merge(self._structure, state)

    def _check(self, params: Mapping[str, Any]) -> None:
        def shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
            leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
            return {"/".join(str(k.key) for k in path): tuple(x.shape) for path, x in leaves}

        wanted, got = shapes(self._abstract), shapes(params)
        if wanted != got:
            wrong = [
                f"{path}: expected {wanted.get(path, 'nothing')}, got {got.get(path, 'nothing')}"
                for path in sorted(wanted.keys() | got.keys())
                if wanted.get(path) != got.get(path)
            ]
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError("parameters do not fit the model: " + "; ".join(wrong[:5]) + more)


__all__ = [
    "BOX_TOKEN", "Encoded", "FunctionalModel", "KVCache", "ModelConfig", "Outputs",
    "VideoLanguageModel",
]  # fmt: skip
