"""Mapping rows of the published vision towers.

Key layouts: `transformers`' modeling_siglip.py, modeling_siglip2.py and modeling_clip.py;
OpenGVLab/TPO's modeling_vit.py for umt; PKU-YuanGroup/Video-LLaVA's languagebind/video/
modeling_video.py for layers with time.
`theirs` is the prefix up to and including "vision_model." where a checkpoint has one.
"""

from __future__ import annotations

from tpo_jax.interop.mapping import Row
from tpo_jax.models.towers.config import TowerConfig


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", transpose=True)]
    return rows + [Row(f"{ours}/bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def self_attention(ours: str, theirs: str) -> list[Row]:
    rows = []
    for our_name, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out")):
        rows += linear(f"{ours}/{our_name}_proj", f"{theirs}.{name}_proj")
    return rows


def encoder_layer(ours: str, theirs: str) -> list[Row]:
    return [
        *norm(f"{ours}/layer_norm1", f"{theirs}.layer_norm1"),
        *self_attention(f"{ours}/self_attn", f"{theirs}.self_attn"),
        *norm(f"{ours}/layer_norm2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
    ]


def siglip_rows(ours: str, theirs: str, *, linear_patches: bool = False) -> list[Row]:
    """SigLIP; with `linear_patches` SigLIP 2 for any aspect ratio."""
    patch = f"{theirs}embeddings.patch_embedding"
    return [
        Row(f"{ours}patch_embedding/kernel", f"{patch}.weight", transpose=linear_patches),
        Row(f"{ours}patch_embedding/bias", f"{patch}.bias"),
        Row(f"{ours}position_embedding", f"{theirs}embeddings.position_embedding.weight"),
        *encoder_layer(f"{ours}layers", theirs + "encoder.layers.{layer}"),
        *norm(f"{ours}post_layernorm", f"{theirs}post_layernorm"),
    ]


def clip_rows(ours: str, theirs: str, *, temporal: bool = False) -> list[Row]:
    """CLIP; with `temporal` LanguageBind's video tower."""
    layers, key = f"{ours}layers", theirs + "encoder.layers.{layer}"
    return [
        Row(f"{ours}class_embedding", f"{theirs}embeddings.class_embedding"),
        Row(f"{ours}patch_embedding/kernel", f"{theirs}embeddings.patch_embedding.weight"),
        Row(f"{ours}position_embedding", f"{theirs}embeddings.position_embedding.weight"),
        *norm(f"{ours}pre_layernorm", f"{theirs}pre_layrnorm"),
        *(temporal_layer(layers, key) if temporal else encoder_layer(layers, key)),
        *norm(f"{ours}post_layernorm", f"{theirs}post_layernorm"),
    ]


def temporal_layer(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/temporal_embedding", f"{theirs}.temporal_embedding"),
        *norm(f"{ours}/temporal_layer_norm1", f"{theirs}.temporal_layer_norm1"),
        *self_attention(f"{ours}/temporal_attn", f"{theirs}.temporal_attn"),
        *encoder_layer(f"{ours}/spatial", theirs),
    ]


def umt_rows(ours: str, theirs: str, post_norm: str) -> list[Row]:
    """`theirs` ends in "encoder."; `post_norm` is the key of the norm behind the tower."""
    layers, key = f"{ours}layers", theirs + "blocks.{layer}"
    return [
        Row(f"{ours}patch_embedding/kernel", f"{theirs}patch_embed.proj.weight"),
        Row(f"{ours}patch_embedding/bias", f"{theirs}patch_embed.proj.bias"),
        *norm(f"{layers}/norm1", f"{key}.norm1"),
        *linear(f"{layers}/attn/qkv", f"{key}.attn.qkv", bias=False),
        Row(f"{layers}/attn/q_bias", f"{key}.attn.q_bias"),
        Row(f"{layers}/attn/v_bias", f"{key}.attn.v_bias"),
        *linear(f"{layers}/attn/proj", f"{key}.attn.proj"),
        *norm(f"{layers}/norm2", f"{key}.norm2"),
        *linear(f"{layers}/mlp/fc1", f"{key}.mlp.fc1"),
        *linear(f"{layers}/mlp/fc2", f"{key}.mlp.fc2"),
        *norm(f"{ours}post_layernorm", post_norm),
    ]


def tower_rows(config: TowerConfig, ours: str, theirs: str) -> list[Row]:
    """Rows of a tower that is one tower (not languagebind, not umt)."""
    if config.kind == "clip":
        return clip_rows(ours, theirs)
    return siglip_rows(ours, theirs, linear_patches=config.kind == "siglip2")
