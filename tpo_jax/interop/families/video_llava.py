"""Video-LLaVA (Lin et al. 2023, 2311.10122): LanguageBind, one shared MLP, Vicuna.

Two layouts: that of `transformers`, whose video tower has no layers over time (its converter drops
them), and the original one of PKU-YuanGroup, which has them. Images give 256 tokens, videos 257 a
frame. The original flips frames at random, at inference too; this program never does.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from tpo_jax.data.text import ChatTemplate
from tpo_jax.interop.families.base import (
    Family,
    FamilyError,
    Pixels,
    Sampling,
    assemble,
    decoder_rows,
    mlp_rows,
    only,
    said,
    tower_config,
    transformers_names,
)
from tpo_jax.interop.families.towers import clip_rows
from tpo_jax.interop.mapping import Row
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.config import MlpConnectorConfig

# The length of a video in VideoLlavaConfig of `transformers` (video_seq_length = 2056) and of the
# original's LanguageBind, whose places in time are as many.
FRAMES = 8
# Both towers of PKU-YuanGroup/LanguageBind start from laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K,
# whose sizes and exact GELU (OpenCLIP's; OpenAI's CLIP has quick_gelu) are in the config.json that
# it has in tokenizer_cache/ (da45496).
LANGUAGEBIND = {
    "model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, "hidden_size": 1024,
    "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "hidden_act": "gelu",
}  # fmt: skip
# Prompts of the port as its documentation writes them (docs/source/en/model_doc/video_llava.md);
# `transformers`' convert_video_llava_weights_to_hf.py saves no chat template.
VICUNA = ChatTemplate(
    before_video="<s>USER: ", after_video="\n", before_image="<s>USER: ", after_image="\n",
    user="", assistant=" ASSISTANT:", end="</s>", pad="<unk>",
)  # fmt: skip
# The original's training and demo code has a system sentence ("v1" of its conversation.py); prompts
# of the port in `transformers` have none.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
VICUNA_V1 = dataclasses.replace(
    VICUNA, before_video=f"<s>{SYSTEM} USER: ", before_image=f"<s>{SYSTEM} USER: "
)
# What the names of the towers end in, as the original's multimodal_encoder/builder.py has it.
TOWERS = {"mm_image_tower": "LanguageBind_Image", "mm_video_tower": "LanguageBind_Video_merge"}
# Of image_aspect_ratio, which is about images; videos are cropped.
RESIZES = {"pad": "pad", "square": "crop"}
CONNECTOR = MlpConnectorConfig(pool="none", newline="no_token", image="plain", class_token=True)


def huggingface_config(config: Mapping[str, Any], pixels: Pixels) -> ModelConfig:
    only(config, "projector_hidden_act", "gelu")
    only(config, "vision_feature_select_strategy", "default")
    only(config, "multimodal_projector_bias", True)
    vision = tower_config(
        {"model_type": "clip_vision_model"} | said(config, "vision_config"),
        layer=config.get("vision_feature_layer", -2),
        pixels=pixels, kind="languagebind",
    )  # fmt: skip
    return assemble(vision, CONNECTOR, {"model_type": "llama"} | said(config, "text_config"))


def huggingface_rows(config: ModelConfig, keys: Collection[str]) -> list[Row]:
    prefix, inner, language = transformers_names(keys)
    projector = f"{prefix}multi_modal_projector"
    return [
        *clip_rows("vision/image_tower/", f"{prefix}image_tower.{inner}"),
        *clip_rows("vision/video_tower/", f"{prefix}video_tower.{inner}"),
        *mlp_rows(config.connector, f"{projector}.linear_1", f"{projector}.linear_2", ""),
        *decoder_rows(config.language, **language, keys=keys),
    ]


def original_config(config: Mapping[str, Any], pixels: Pixels) -> ModelConfig:
    """`vision_config` in `config` (not in published files) gives the sizes of other towers."""
    for option, name in TOWERS.items():
        if not str(said(config, option)).rstrip("/").endswith(name):
            raise FamilyError(
                f"config.json: {option}={config[option]!r}: this program has only {name}, of other "
                "towers it would read other numbers; import a checkpoint with that tower"
            )
    said(config, "mm_projector_type", ("mlp2x_gelu",))
    said(config, "mm_vision_select_feature", ("patch",))
    vision = tower_config(
        config.get("vision_config") or LANGUAGEBIND, kind="languagebind", frames=FRAMES,
        layer=said(config, "mm_vision_select_layer"), max_frames=FRAMES,
        pixels=pixels, resize=RESIZES[said(config, "image_aspect_ratio", RESIZES)],
    )  # fmt: skip
    return assemble(vision, CONNECTOR, collections.ChainMap({"model_type": "llama"}, config))


def original_rows(config: ModelConfig, keys: Collection[str]) -> list[Row]:
    return [
        *clip_rows("vision/image_tower/", "model.image_tower.image_tower."),
        *clip_rows("vision/video_tower/", "model.video_tower.video_tower.", temporal=True),
        *mlp_rows(config.connector, "model.mm_projector.0", "model.mm_projector.2", ""),
        *decoder_rows(config.language, body="model.", head="lm_head.weight", keys=keys),
    ]


HUGGINGFACE = Family(
    name="video_llava",
    matches=lambda config: config.get("model_type") == "video_llava",
    model_config=huggingface_config,
    rows=huggingface_rows,
    template=VICUNA,
    reads_template=True,
    sampling=lambda config: Sampling("evenly", FRAMES),
    carried=(r".*\.position_ids", r".*rotary_emb\.inv_freq"),
    layouts="transformers/models/video_llava/modeling_video_llava.py",
)
ORIGINAL = Family(
    name="video_llava_original",
    matches=lambda config: "mm_video_tower" in config,
    model_config=original_config,
    rows=original_rows,
    template=VICUNA_V1,
    sampling=lambda config: Sampling("evenly", FRAMES),
    carried=(r".*\.position_ids", r".*rotary_emb\.inv_freq"),
    layouts="PKU-YuanGroup/Video-LLaVA videollava/model, and the renaming in transformers' "
    "convert_video_llava_weights_to_hf.py",
)
