"""Runs an exported tpo_jax model in PyTorch: video encoder, task tokens and heads.

Needs torch, transformers, safetensors and numpy; it reads only the folder that it lies in,
where its layers are in tpo_torch_layers.py.

    from tpo_torch import VideoLanguageModel
    model = VideoLanguageModel.from_folder("exported")
    visual, features = model.encode(frames, times)       # uint8[1, F, H, W, 3], seconds [1, F]
    hidden = model.hidden("When does the red circle grow?", "<time_begin><temp>", visual)
    spans = model.temporal(hidden[:, -1:], features)     # the state at the slot token

Weights keep the names and the [in, out] layout of tpo_jax; a stacked leaf has one entry a layer.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from safetensors.torch import load_file
from torch import Tensor
from tpo_torch_layers import (
    Tensors,
    Weights,
    add_motion,
    after_reading,
    attend,
    attend_weighted,
    bilinear_weights,
    cell_centres,
    cells_inside,
    encoder,
    feed_forward,
    frame_mixer,
    input_projection,
    inverse_sigmoid,
    layer_norm,
    linear,
    mlp,
    norm,
    position_waves,
    relu_mlp,
    self_attention,
    sine_waves,
    slot_attention,
    time_waves,
    to_patches,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SLOT_TOKENS = {"<boxes>": "region", "<temp>": "temporal", "<tracking>": "mask"}
BOX_TOKEN = "<track_box>"


class VideoLanguageModel:
    """The exported model in float32. Every frame of a clip is taken to be valid."""

    def __init__(
        self, config: dict[str, Any], template: dict[str, str], tensors: Tensors,
        language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    ):  # fmt: skip
        self.config, self.template = config, template
        self.weights = Weights(tensors)
        self.language, self.tokenizer = language, tokenizer
        self.head_heads = config["head"]["heads"]

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> VideoLanguageModel:
        folder = pathlib.Path(folder)
        about = json.loads((folder / "tpo_config.json").read_text())
        language = AutoModelForCausalLM.from_pretrained(folder / "language_model")
        if (folder / "adapter").exists():
            from peft import PeftModel

            language = PeftModel.from_pretrained(language, folder / "adapter").merge_and_unload()
        return cls(
            about["model"],
            about["template"],
            load_file(folder / "tpo.safetensors"),
            language.eval(),
            AutoTokenizer.from_pretrained(folder / "language_model"),
        )

    @staticmethod
    def normalise(frames: ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(frames)).float() / 127.5 - 1.0

    def encode(self, frames: ArrayLike, times: ArrayLike) -> tuple[Tensor, Tensors]:
        """uint8[B, F, H, W, 3] at times float[B, F], seconds -> visual tokens [B, n, D] and
        {"stem", "patches", "pixels"}."""
        vision = self.config["vision"]
        w = self.weights.at("vision")
        pixels = self.normalise(frames)
        x, stem = add_motion(pixels) if vision["motion"] else pixels, None
        levels = len(vision["stem_strides"])
        for i, stride in enumerate(vision["stem_strides"]):
            x = linear(w.at("stem").at(f"level{i}").at("proj"), to_patches(x, stride))
            if i + 1 < levels:
                x = layer_norm(w.at("stem_norms").at(f"level{i}"), x)
                x = F.gelu(x, approximate="tanh")
            stem = x if stem is None else stem
        B, frames_n, h, wd, D = x.shape
        x = x.reshape(B, frames_n, h * wd, D) + w["position"]
        if vision["temporal"] == "divided":
            x = x + w["frame_position"][:frames_n, None]
        for layer in range(vision["depth"]):
            x = self._vision_block(w.at("layers", layer), x)
        patches = layer_norm(w.at("final_norm"), x).reshape(B, frames_n, h, wd, D)
        features = {"stem": stem, "patches": patches, "pixels": pixels}
        return self._connect(patches, torch.as_tensor(np.asarray(times)).float()), features

    def _vision_block(self, w: Weights, x: Tensor) -> Tensor:
        vision = self.config["vision"]
        B, frames, p, D = x.shape
        if vision["temporal"] == "divided":
            over_time = layer_norm(w.at("temporal_norm"), x).transpose(1, 2).flatten(0, 1)
            over_time = self_attention(w.at("temporal_attention"), over_time, vision["heads"])
            x = x + over_time.view(B, p, frames, D).transpose(1, 2)
        over_space = layer_norm(w.at("spatial_norm"), x).flatten(0, 1)
        x = x + self_attention(w.at("spatial_attention"), over_space, vision["heads"]).view_as(x)
        return x + mlp(w.at("mlp"), layer_norm(w.at("mlp_norm"), x))

    def _connect(self, patches: Tensor, times: Tensor) -> Tensor:
        B, frames, h, w, D = patches.shape
        grid = self.config["connector"]["grid"]
        x = patches.reshape(B, frames, grid, h // grid, grid, w // grid, D).mean((3, 5))
        w, periods = self.weights.at("connector"), self.config["connector"]["time_periods"]
        tokens = mlp(w.at("mlp"), x.reshape(B, frames * grid * grid, D))
        if periods is None:
            return tokens
        waves = time_waves(times, periods)
        return tokens + linear(w.at("time"), waves).repeat_interleave(grid * grid, 1)

    def prompt_ids(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids around the visual tokens: before, and after with question and answer."""
        t = self.template

        def ids(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False)

        # Texts are tokenised apart, as in training: a template token never joins a word.
        after = ids(t["after_video"]) + ids(t["user"]) + ids(question) + ids(t["assistant"])
        return ids(t["before_video"]), after + ids(answer)

    def embed(self, ids: Sequence[int], boxes: Sequence[Sequence[float]] = ()) -> Tensor:
        """Embeddings [1, n, D]; slot tokens are task vectors, box tokens the boxes in turn."""
        names = {token: self.config["tokens"].get(token) for token in (*SLOT_TOKENS, BOX_TOKEN)}
        embeds = self.language.get_input_embeddings()(torch.tensor([ids])).clone()
        boxes = iter(boxes)
        for i, token in enumerate(ids):
            for name, head in SLOT_TOKENS.items():
                if token == names[name]:
                    embeds[0, i] = self.weights.at("task_tokens")[head]
            if token == names[BOX_TOKEN]:
                box = torch.tensor(next(boxes), dtype=torch.float32)
                embeds[0, i] = mlp(self.weights.at("box_encoder"), box)
        return embeds

    def hidden(
        self, question: str, answer: str, visual: Tensor, boxes: Sequence[Sequence[float]] = ()
    ) -> Tensor:
        """States [1, n, D] after the final norm for the text after the video, answer included."""
        before, after = self.prompt_ids(question, answer)
        embeds = torch.cat([self.embed(before), visual, self.embed(after, boxes)], dim=1)
        states = self.language.model(inputs_embeds=embeds).last_hidden_state
        return states[:, len(before) + visual.shape[1] :]

    def _frame_tokens(self, features: Tensors) -> Tensor:
        """[B, F, h1 * w1, C], which the region and the mask head read."""
        w = self.weights.at("heads").at("frame_tokens")
        fine = linear(w.at("stem_proj"), features["stem"])
        coarse = linear(w.at("patch_proj"), features["patches"])
        repeats = fine.shape[2] // coarse.shape[2]
        coarse = coarse.repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)
        rows, columns = fine.shape[2:4]
        position = linear(w.at("position_proj"), position_waves(cell_centres(rows, columns)))
        x = layer_norm(w.at("norm"), (fine + coarse).flatten(2, 3) + position)
        return layer_norm(w.at("final_norm"), x + mlp(w.at("mlp"), x))

    def _slot_query(
        self, w: Weights, slot_states: Tensor, prompt: Tensor, embeds: Tensor
    ) -> Tensor:
        words = linear(w.at("word_proj"), prompt + layer_norm(w.at("embed_norm"), embeds))
        words = layer_norm(w.at("word_norm"), words)
        slots = mlp(w.at("slot_mlp"), slot_states)
        return slot_attention(w.at("reading"), slots, words, self.head_heads)

    def region(
        self, slot_states: Tensor, features: Tensors, prompt: Tensor, embeds: Tensor, frame: int = 0
    ) -> Tensor:
        """[1, S, D] at slots, [1, T, D] at the tokens of their question (hidden states, and what
        `embed` gives for them) -> boxes [1, S, 4], xyxy normalised, on one frame."""
        w = self.weights.at("heads").at("region")
        tokens = self._frame_tokens(features)[:, frame]
        B, S, _ = slot_states.shape
        x = self._slot_query(w.at("slot_query"), slot_states, prompt, embeds).reshape(B * S, 1, -1)
        tokens = tokens.repeat_interleave(S, 0)
        layers = w.at("layers")
        for i in range(layers.children("layer")):
            x = slot_attention(layers.at(f"layer{i}"), x, tokens, self.head_heads)
        query = layer_norm(w.at("final_norm"), x)[:, 0]
        cells = torch.einsum("rc,rtc->rt", query, tokens) * tokens.shape[-1] ** -0.5
        weights = torch.softmax(cells, -1)
        grid = math.isqrt(tokens.shape[1])
        places = cell_centres(grid, grid)
        mean = weights @ places
        spread = torch.sqrt((weights @ places**2 - mean**2).clamp(min=0) + 1e-4)
        found = torch.einsum("rt,rtc->rc", weights, tokens)
        correction = mlp(w.at("readout"), torch.cat([found, query, mean, spread], -1))
        centre = mean + 0.1 * torch.tanh(correction[:, :2])
        half = 12**0.5 * spread * torch.exp(correction[:, 2:]) / 2
        return torch.cat([centre - half, centre + half], -1).view(B, S, 4)

    def temporal(self, slot_states: Tensor, features: Tensors) -> Tensors:
        """[1, S, D] -> {"foreground" [1, S, F], "spans" [1, S, F, 2], "saliency" [1, S, F]}."""
        w = self.weights.at("heads").at("temporal")
        patches = features["patches"]
        (B, frames), S = patches.shape[:2], slot_states.shape[1]
        tokens = layer_norm(w.at("patch_norm"), linear(w.at("patch_proj"), patches))
        tokens = tokens.reshape(B * frames, -1, tokens.shape[-1])
        slots = mlp(w.at("slot_mlp"), slot_states).repeat_interleave(frames, 0)
        x = slot_attention(w.at("pool"), slots, tokens, self.head_heads)
        x = x.view(B, frames, S, -1).transpose(1, 2) + self._time(w, frames)
        layers = w.at("layers")
        for i in range(layers.children("layer")):
            x = frame_mixer(layers.at(f"layer{i}"), x, self.head_heads)
        x = layer_norm(w.at("final_norm"), x)
        centres = (torch.arange(frames) + 0.5) / frames
        reach = torch.sigmoid(mlp(w.at("offsets"), x))
        return {
            "foreground": linear(w.at("foreground"), x)[..., 0],
            "spans": centres[:, None] + reach * torch.tensor([-1.0, 1.0]),
            "saliency": linear(w.at("saliency"), x)[..., 0],
        }

    def cg_detr(
        self, slot_states: Tensor, features: Tensors, prompt: Tensor,
        clip_features: Tensor | None = None,
    ) -> Tensors:  # fmt: skip
        """[1, S, D] at slots, [1, T, D] at the tokens of their question (or its text features, if
        the config has some), clip features [1, F, width] likewise -> {"logits", "spans" [1, S,
        layers, Q, 2] (centre, width), "saliency", "relevance" [1, S, F]}."""
        w, heads = self.weights.at("heads").at("cg_detr"), self.head_heads
        embed, readers = w.at("embed"), w.at("readers")
        S, width = slot_states.shape[1], embed["kinds"].shape[1]
        states = torch.cat([prompt.expand(S, -1, -1), slot_states.transpose(0, 1)], 1)
        words = input_projection(w.at("text_proj"), states) + embed["kinds"][0]
        dummies, count = embed["dummies"].expand(S, -1, -1), len(embed["dummies"])
        places = F.pad(embed["dummy_places"], (0, 0, 0, words.shape[1]))
        seen = encoder(w.at("dummy_encoder"), torch.cat([dummies, words], 1), places, heads)
        keys = torch.cat([seen[:, :count], words], 1)
        spoken = torch.cat([torch.zeros_like(dummies), words], 1)
        given = features["patches"] if clip_features is None else clip_features
        clips, position = self._cg_detr_clips(w, words[:, -1], given[0])
        read, attention, layers = clips, 0.0, range(readers.children("layer"))
        for i in layers:
            mixed, weights = attend_weighted(read + position, keys + places, spoken, heads)
            read = after_reading(readers.at(f"layer{i}"), read, mixed)
            attention = attention + weights / len(layers)
        relevance = attention[:, :, count:].sum(-1).clamp(0, 1)
        mean, prompts = clips.mean(1), embed["prompts"]
        likeness = F.normalize(clips - mean[:, None], dim=-1) @ F.normalize(prompts, dim=-1).T
        shares = relevance / relevance.sum(-1, keepdim=True).clamp(min=1e-6)
        share, index = torch.einsum("nf,nfp->np", shares, likeness.softmax(-1)).max(-1)
        token, place = (mean + share[:, None] * prompts[index])[:, None], embed["prompt_place"]
        for i in layers:
            token = after_reading(readers.at(f"layer{i}"), token, torch.zeros_like(token))
        placed = torch.cat([place.expand(S, 1, width), position.expand(S, -1, width)], 1)
        memory = encoder(w.at("encoder"), torch.cat([token, read], 1), placed, heads)
        whole, memory = memory[:, :1], memory[:, 1:] + memory[:, :1]
        saliency = linear(w.at("saliency_clip"), memory) * linear(w.at("saliency_token"), whole)
        logits, spans = self._cg_detr_decode(w.at("decoder"), memory, position)
        found = {"logits": logits, "spans": spans, "relevance": relevance}
        found["saliency"] = saliency.sum(-1) * width**-0.5
        return {name: value[None] for name, value in found.items()}

    def _cg_detr_clips(self, w: Weights, slots: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """[S, C], patches [F, h, w, D] or features [F, D] -> clips [S, F, C], positions [F, C]."""
        if given.ndim == 2:
            seen = given.expand(len(slots), -1, -1)
        else:
            tokens = norm(w.at("patch_norm"), linear(w.at("patch_proj"), given.flatten(1, 2)))
            seen = slot_attention(
                w.at("pool"), slots.expand(len(given), -1, -1), tokens, self.head_heads
            ).transpose(0, 1)
        centres = (torch.arange(len(given)) + 0.5) / len(given)
        ends = torch.stack([centres - centres[0], centres + centres[0]], -1)
        clips = torch.cat([seen, ends.expand(len(slots), -1, -1)], -1)
        clips = input_projection(w.at("clip_proj"), clips) + w.at("embed")["kinds"][1]
        return clips, sine_waves(ends[:, 1], slots.shape[-1])

    def _cg_detr_decode(
        self, w: Weights, memory: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[S, F, C], [F, C] -> logits and spans [S, layers, Q, 2]."""
        heads, (S, _, width) = self.head_heads, memory.shape
        anchors = torch.sigmoid(w.at("embed")["anchors"]).expand(S, -1, -1)
        x = memory.new_zeros(S, anchors.shape[1], width)
        layers, logits, spans = w.at("layers"), [], []

        def beside(content: Tensor, place: Tensor) -> Tensor:
            parts = [t.unflatten(-1, (heads, -1)) for t in (content, place)]
            return torch.cat(parts, -1).flatten(2)

        for i in range(layers.children("layer")):
            layer = layers.at(f"layer{i}")
            waves = sine_waves(anchors, width // 2).flatten(2)
            place = relu_mlp(w.at("place"), waves)
            scale = torch.sigmoid(relu_mlp(w.at("width_scale"), x))
            waves = waves * scale / anchors[..., 1:].clamp(min=1e-6)
            waves = waves * relu_mlp(w.at("wave_scale"), x) if i else waves
            p = layer.at("self_proj")
            q = linear(p.at("q"), x) + linear(p.at("q_place"), place)
            k = linear(p.at("k"), x) + linear(p.at("k_place"), place)
            x = x + linear(p.at("o"), attend(q, k, linear(p.at("v"), x), heads))
            x = norm(layer.at("self_norm"), x)
            p = layer.at("cross_proj")
            q, k = linear(p.at("q"), x), linear(p.at("k"), memory)
            k_place = linear(p.at("k_place"), position).expand_as(k)
            if i == 0:
                q, k = q + linear(layer.at("q_place"), place), k + k_place
            q, k = beside(q, linear(p.at("q_wave"), waves)), beside(k, k_place)
            mixed, _ = attend_weighted(q, k, linear(p.at("v"), memory), heads)
            x = norm(layer.at("cross_norm"), x + linear(p.at("o"), mixed))
            x = norm(layer.at("final_norm"), x + feed_forward(layer.at("feed_forward"), x))
            state = norm(w.at("norm"), x)
            logits.append(linear(w.at("foreground"), state))
            start = inverse_sigmoid(anchors)
            spans.append(torch.sigmoid(relu_mlp(w.at("span"), state) + start))
            anchors = torch.sigmoid(relu_mlp(w.at("refine"), x) + start)
        return torch.stack(logits, 1), torch.stack(spans, 1)

    def mask(
        self, slot_states: Tensor, features: Tensors, prompt: Tensor, embeds: Tensor,
        box: Sequence[float] | None = None, box_frame: int = 0,
    ) -> Tensors:  # fmt: skip
        """As `region`, and a box (x1, y1, x2, y2) that the user drew on one frame -> logits
        {"masks" [1, S, F, m, m], "cells" [1, S, F, h, h], "presence" [1, S, F]}."""
        w = self.weights.at("heads").at("mask")
        pixels, tokens = features["pixels"], self._frame_tokens(features)
        (B, frames), S = tokens.shape[:2], slot_states.shape[1]
        x = self._slot_query(w.at("slot_query"), slot_states, prompt, embeds)
        if box is not None:
            shares = cells_inside(torch.tensor(box), math.isqrt(tokens.shape[2]))
            x = x + linear(w.at("box_proj"), shares @ tokens[:, box_frame])
        tokens = tokens.flatten(0, 1)
        x = x[:, :, None] + self._time(w, frames)
        searches, mixers = w.at("searches"), w.at("mixers")
        for i in range(searches.children("layer")):
            x = x.transpose(1, 2).flatten(0, 1)
            x = slot_attention(searches.at(f"layer{i}"), x, tokens, self.head_heads)
            x = x.view(B, frames, S, -1).transpose(1, 2)
            x = frame_mixer(mixers.at(f"layer{i}"), x, self.head_heads)
        x = layer_norm(w.at("final_norm"), x)
        found = torch.einsum("bsfc,bftc->bsft", x, tokens.unflatten(0, (B, frames)))
        found = found * tokens.shape[-1] ** -0.5
        query = mlp(w.at("query"), x)
        stride = self.config["head"]["mask_stride"]
        size, grid = pixels.shape[-2] // stride, math.isqrt(tokens.shape[1])
        context = linear(w.at("token_proj"), tokens).unflatten(1, (grid, grid))
        resize = bilinear_weights(grid, size)
        context = torch.einsum("ah,bw,nhwc->nabc", resize, resize, context)
        cells = linear(w.at("raw_proj"), to_patches(pixels, stride)).flatten(0, 1) + context
        cells = linear(w.at("pixel_out"), F.gelu(cells, approximate="tanh"))
        cells = cells.view(B, frames, size * size, -1)
        logits = torch.einsum("bsfc,bfpc->bsfp", query[..., :-1], cells) + query[..., -1:]
        found = found.unflatten(-1, (grid, grid))
        coarse = torch.einsum("ah,bw,...hw->...ab", resize, resize, found)
        return {
            "masks": logits.unflatten(-1, (size, size)) + coarse,
            "cells": found,
            "presence": linear(w.at("presence"), x)[..., 0],
        }

    def _time(self, w: Weights, frames: int) -> Tensor:
        """[F, C]: what a head adds to its states so that frames differ."""
        centres = (torch.arange(frames) + 0.5) / frames
        return linear(w.at("frame_proj"), position_waves(centres[:, None]))
