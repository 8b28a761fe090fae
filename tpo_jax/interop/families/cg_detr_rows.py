"""Mapping rows of CG-DETR (Moon et al. 2023, 2311.08835) as VideoChat-TPO has it in `cg_model`.

Names are those of OpenGVLab/TPO's model.safetensors.index.json; which is which was read in its
third_party/cgdetr/cg_detr/{model,transformer}.py. Position embeddings of the text, a third
projection of it (`txt_position_embed`, `txt_proj_linear`) and the criterion's class weights are
read by nothing there, and have no leaf here.
"""

from __future__ import annotations

from tpo_jax.interop.families.towers import linear, norm
from tpo_jax.interop.mapping import Row

# Leaf of `embed` -> tensor, axes of length 1 in front.
_EMBEDDED = {
    "kinds": ("token_type_embeddings.weight", 0),
    "dummies": ("dummy_rep_token", 0), "dummy_places": ("dummy_rep_pos", 0),
    "sentence": ("sent_rep_token", 0), "sentence_place": ("sent_rep_pos", 0),
    "moment": ("moment_rep_token", 0), "moment_place": ("moment_rep_pos", 0),
    "prompts": ("global_rep_token", 0), "prompt_place": ("global_rep_pos", 1),
}  # fmt: skip
# Linear layers of a decoder layer, ours -> theirs; "cross_proj/o" and "self_proj/o" are below.
_DECODER = {
    "self_proj/q": "sa_qcontent_proj", "self_proj/q_place": "sa_qpos_proj",
    "self_proj/k": "sa_kcontent_proj", "self_proj/k_place": "sa_kpos_proj",
    "self_proj/v": "sa_v_proj", "self_proj/o": "self_attn.out_proj",
    "cross_proj/q": "ca_qcontent_proj", "cross_proj/q_wave": "ca_qpos_sine_proj",
    "cross_proj/k": "ca_kcontent_proj", "cross_proj/k_place": "ca_kpos_proj",
    "cross_proj/v": "ca_v_proj", "cross_proj/o": "cross_attn.out_proj",
}  # fmt: skip
_NORMS = {"self_norm": "norm1", "cross_norm": "norm2", "final_norm": "norm3"}


def cg_detr_rows(depth: int, ours: str, theirs: str) -> list[Row]:
    """All rows, of prefixes with their separator at the end.

    Args:
      depth: `head.layers`; the encoder and the decoder have one layer more.
    """
    inner = f"{theirs}transformer."
    rows = [
        Row(f"{ours}embed/{name}", f"{theirs}{key}", lead=lead)
        for name, (key, lead) in _EMBEDDED.items()
    ]
    for name, key in (("clip_proj", "input_vid_proj"), ("text_proj", "input_txt_proj")):
        for i in range(2):
            rows += norm(f"{ours}{name}/norm{i + 1}", f"{theirs}{key}.{i}.LayerNorm")
            rows += linear(f"{ours}{name}/linear{i + 1}", f"{theirs}{key}.{i}.net.1")
    for name, key, layers in (
        ("dummy_encoder", f"{theirs}txtproj_encoder", depth),
        ("sentence_encoder", f"{theirs}scls_encoder", 1),
        ("moment_encoder", f"{inner}mcls_encoder", 1),
        ("encoder", f"{inner}encoder", depth + 1),
    ):
        for i in range(layers):
            rows += _encoder_layer(f"{ours}{name}/layers/layer{i}", f"{key}.layers.{i}")
    for i in range(depth):
        rows += _half_layer(f"{ours}readers/layer{i}", f"{inner}t2v_encoder.layers.{i}")
    rows += linear(f"{ours}saliency_clip", f"{theirs}saliency_proj1")
    rows += linear(f"{ours}saliency_token", f"{theirs}saliency_proj2")
    return rows + _decoder_rows(depth + 1, f"{ours}decoder/", theirs, f"{inner}decoder.")


def _decoder_rows(layers: int, ours: str, model: str, theirs: str) -> list[Row]:
    rows = [
        Row(f"{ours}embed/anchors", f"{model}query_embed.weight"),
        *_mlp(f"{ours}span", f"{model}span_embed", 3),
        *linear(f"{ours}foreground", f"{model}class_embed"),
        *_mlp(f"{ours}refine", f"{theirs}bbox_embed", 3),
        *_mlp(f"{ours}place", f"{theirs}ref_point_head", 2),
        *_mlp(f"{ours}wave_scale", f"{theirs}query_scale", 2),
        *_mlp(f"{ours}width_scale", f"{theirs}ref_anchor_head", 2),
        *norm(f"{ours}norm", f"{theirs}norm"),
    ]
    for i in range(layers):
        path, key = f"{ours}layers/layer{i}", f"{theirs}layers.{i}"
        for name, proj in _DECODER.items():
            rows += linear(f"{path}/{name}", f"{key}.{proj}")
        if i == 0:
            rows += linear(f"{path}/q_place", f"{key}.ca_qpos_proj")
        for name, their_name in _NORMS.items():
            rows += norm(f"{path}/{name}", f"{key}.{their_name}")
        rows += _feed_forward(f"{path}/feed_forward", key)
    return rows


def _encoder_layer(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/qkv/kernel", f"{theirs}.self_attn.in_proj_weight", transpose=True),
        Row(f"{ours}/qkv/bias", f"{theirs}.self_attn.in_proj_bias"),
        *_half_layer(ours, theirs),
    ]


def _half_layer(ours: str, theirs: str) -> list[Row]:
    """All of a layer but how queries, keys and values come about."""
    return [
        *linear(f"{ours}/o_proj", f"{theirs}.self_attn.out_proj"),
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_feed_forward(f"{ours}/feed_forward", theirs),
    ]


def _feed_forward(ours: str, theirs: str) -> list[Row]:
    return [
        *linear(f"{ours}/fc1", f"{theirs}.linear1"),
        *linear(f"{ours}/fc2", f"{theirs}.linear2"),
        Row(f"{ours}/slope", f"{theirs}.activation.weight", lead=1),
    ]


def _mlp(ours: str, theirs: str, layers: int) -> list[Row]:
    pairs = ((f"{ours}/layers/layer{i}", f"{theirs}.layers.{i}") for i in range(layers))
    return [row for pair in pairs for row in linear(*pair)]
