"""VideoChat2 and VideoChat-TPO (2311.17005, 2412.19326): UMT-L, Q-Former, Mistral with LoRA.

The heads of a TPO checkpoint are in tpo_heads.py; of heads that are not asked for and of what its
own code does not use either (the Q-Former's text half, older heads) the tensors are carried.
"""

from __future__ import annotations

import dataclasses
import re
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
    said,
)
from tpo_jax.interop.families.towers import linear, norm, umt_rows
from tpo_jax.interop.families.tpo_heads import head_rows, with_heads
from tpo_jax.interop.mapping import Row
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.published import IMAGENET_MEAN, IMAGENET_STD, VIDEOCHAT_LORA
from tpo_jax.models.towers.config import TowerConfig

# Positions of the published tower were trained with four frames.
TRAINED_FRAMES = 4
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32007, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
}  # fmt: skip


# Its code puts <s> in front of every piece of text, the one behind the visual tokens included.
TEMPLATE = ChatTemplate(
    before_video="<s>[INST] <Video>", after_video="<s></Video>[/INST]",
    before_image="<s>[INST] <Image>", after_image="<s></Image>[/INST]",
    user="<s> [INST] ", assistant=" [/INST] ", end="</s>", pad="<unk>",
)  # fmt: skip


def model_config(config: Mapping[str, Any], pixels: Pixels) -> ModelConfig:
    """`qformer_config` and `llm_config` in `config` (not in published files) give other sizes."""
    del pixels  # published checkpoints have none
    parts = config["model_config"]
    vision, bridge, llm = parts["vision_encoder"], parts["bridge"], parts["llm"]
    said(bridge, "name", ("qformer",))
    if config.get("llm_config") is None:
        said(llm, "name", ("mistral_7b",))
    if said(vision, "tubelet_size") != 1:
        raise FamilyError(f"vision_encoder.tubelet_size={vision['tubelet_size']}: only 1 is known")
    tower = TowerConfig(
        kind="umt", image_size=said(vision, "img_size"), patch_size=said(vision, "patch_size"),
        width=vision["encoder_embed_dim"], heads=vision["encoder_num_heads"],
        # Layers behind the one that is read are not stored.
        depth=vision["encoder_depth"] + said(vision, "return_index") + 1, layer=-1,
        mlp_width=4 * vision["encoder_embed_dim"], activation="gelu", epsilon=1e-6,
        frames=vision.get("ckpt_num_frame", TRAINED_FRAMES), max_frames=said(vision, "num_frames"),
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    bert = config.get("qformer_config") or BERT_BASE
    connector = QFormerConfig(
        queries=said(bridge, "num_query_token"), extra_queries=bridge["extra_num_query_token"],
        width=bert["hidden_size"], depth=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"], mlp_width=bert["intermediate_size"],
    )  # fmt: skip
    size = {"rank": llm["lora_r"], "alpha": float(llm["lora_alpha"])} if llm["use_lora"] else None
    lora = size and dataclasses.replace(VIDEOCHAT_LORA, **size)
    return assemble(tower, connector, config.get("llm_config") or MISTRAL_7B, lora=lora)


def rows(config: ModelConfig, keys: Collection[str]) -> list[Row]:
    lora = config.lora is not None
    base = "lm.base_model.model." if lora else "lm."
    table = decoder_rows(
        config.language, body=f"{base}model.", head=f"{base}lm_head.weight", keys=keys
    )
    return [
        *umt_rows("vision/", "vision_encoder.encoder.", "vision_layernorm"),
        *qformer_rows("connector/"),
        *(part for row in table for part in (
            with_lora(row) if lora and re.search(VIDEOCHAT_LORA.pattern, row.ours) else [row])),
        *head_rows(config),
    ]  # fmt: skip


def unapplied(config: Mapping[str, Any]) -> list[str]:
    """Dropout and stochastic depth of the Q-Former."""
    bridge = config["model_config"]["bridge"]
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    return [f"model_config.bridge.{name}={bridge[name]}"
            for name in (f"qformer_{rate}" for rate in rates) if bridge.get(name)]  # fmt: skip


def with_lora(row: Row) -> list[Row]:
    """Rows of a kernel that PEFT has wrapped."""
    ours, theirs = row.ours.removesuffix("/kernel"), row.theirs.removesuffix(".weight")
    return [
        Row(row.ours, f"{theirs}.base_layer.weight", row.transpose, row.rows),
        Row(f"{ours}/lora_a", f"{theirs}.lora_A.default.weight", transpose=True),
        Row(f"{ours}/lora_b", f"{theirs}.lora_B.default.weight", transpose=True, rows=row.rows),
    ]


def qformer_rows(ours: str) -> list[Row]:
    """Names of OpenGVLab/TPO's modeling_qformer.py; pairs of layers are one entry here."""
    bert = "qformer.bert."
    table = [
        Row(f"{ours}query_tokens", "query_tokens"),
        Row(f"{ours}extra_query_tokens", "extra_query_tokens"),
        *norm(f"{ours}embeddings_norm", f"{bert}embeddings.LayerNorm"),
        *linear(f"{ours}project_up", "project_up"),
    ]
    for first, half in enumerate(("even", "odd")):
        path, key = f"{ours}layers/{half}", bert + "encoder.layer.{layer}."
        part = _attention(f"{path}/attention", f"{key}attention")
        if half == "even":
            part += _attention(f"{path}/crossattention", f"{key}crossattention")
        part += linear(f"{path}/mlp/fc1", f"{key}intermediate_query.dense")
        part += linear(f"{path}/mlp/fc2", f"{key}output_query.dense")
        part += norm(f"{path}/mlp/norm", f"{key}output_query.LayerNorm")
        table += [Row(r.ours, r.theirs, r.transpose, first=first, step=2) for r in part]
    return table


def _attention(ours: str, theirs: str) -> list[Row]:
    table = []
    for name in ("query", "key", "value"):
        table += linear(f"{ours}/{name}", f"{theirs}.self.{name}")
    return [
        *table,
        *linear(f"{ours}/dense", f"{theirs}.output.dense"),
        *norm(f"{ours}/norm", f"{theirs}.output.LayerNorm"),
    ]


FAMILY = Family(
    name="videochat",
    matches=lambda config: "bridge" in (config.get("model_config") or {}),
    model_config=model_config,
    rows=rows,
    with_heads=with_heads,
    head_options=("sam2_config", "cg_config"),
    template=TEMPLATE,
    sampling=lambda config: Sampling(
        "middles", config["model_config"]["vision_encoder"]["num_frames"]
    ),
    carried=(
        r"(action_embed|temporal_embed|track_embed|track_embed_decode2)\..*",
        r"(loc_decoder|loc_encoder|merge_proj|project_down)\..*",
        r"(cg_model|cg_criterion|sam)\..*",
        r"(box|temporal|track)_token",
        r"qformer\.bert\.embeddings\.(word_embeddings|position_embeddings)\.weight",
        r"qformer\.bert\.embeddings\.position_ids",
        r"qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    ),
    unapplied=unapplied,
    layouts="OpenGVLab/TPO inference/model.safetensors.index.json and modeling_*.py",
)  # fmt: skip
