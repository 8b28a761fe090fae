"""SAM 2 of `transformers` (model_type "sam2_video") and our mask head of that name.

The key layout is that of modeling_sam2_video.py. The network lies at heads/sam2/network in a model;
the adapter and the box readout beside it belong to Task Preference Optimization and are in no
checkpoint of SAM 2. `Sam2Model` (model_type "sam2") is the same network without its memory: it is
read, and training makes the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from tpo_jax.errors import MissingFile
from tpo_jax.interop.chat_template import read_json
from tpo_jax.interop.families.base import FamilyError, only, said
from tpo_jax.interop.families.towers import linear, norm
from tpo_jax.interop.huggingface import read_tensors, side_files, write_tensors
from tpo_jax.interop.mapping import Row, export_leaves, import_leaves
from tpo_jax.models.sam2_config import PUBLISHED, STAGES, Sam2Config

MODEL_TYPE = "sam2_video"
# Of `Sam2Model`, which finds objects in single images.
IMAGE_TYPE = "sam2"
# The head, and where its network lies in a model.
NAME = "sam2"
PREFIX = f"heads/{NAME}/network/"
# Saved with every checkpoint and read by nothing, there or here.
IGNORED = ("no_memory_positional_encoding",)
# Field of Sam2Config -> option of Sam2VideoConfig: sizes of the memory.
_MEMORY = {
    "memory_width": "memory_encoder_output_channels",
    "memory_layers": "memory_attention_num_layers",
    "memory_mlp_width": "memory_attention_feed_forward_hidden_size",
    "fuser_layers": "memory_fuser_num_layers",
    "fuser_mlp_width": "memory_fuser_intermediate_dim",
    "memories": "num_maskmem",
    "pointers": "max_object_pointers_in_encoder",
    "pointer_times": "enable_temporal_pos_encoding_for_object_pointers",
    "occlusion_embedding": "enable_occlusion_spatial_embedding",
}


def is_sam2(source: epath.PathLike) -> bool:
    """Whether a folder holds SAM 2 in the layout of `transformers`."""
    kind = read_json(epath.Path(source) / "config.json").get("model_type")
    return kind in (MODEL_TYPE, IMAGE_TYPE)


def import_folder(path: epath.PathLike) -> tuple[Sam2Config, dict[str, Any]]:
    """The configuration and the leaves {"image_encoder/...": array} of a folder with config.json
    and safetensors; leaves are read when they are asked for.

    Raises:
      FamilyError, MappingError: name what does not fit; so does a folder of `Sam2Model`.
    """
    config, leaves, missing = import_network(path)
    if missing:
        raise FamilyError(
            f"{epath.Path(path) / 'config.json'}: model_type={IMAGE_TYPE!r}: expected "
            f"{MODEL_TYPE!r}, as here the memory is needed, too; give a folder that "
            "`Sam2VideoModel` saved (that of `Sam2Model` can be put into a model by import --into)"
        )
    return config, leaves


def import_network(path: epath.PathLike) -> tuple[Sam2Config, dict[str, Any], list[str]]:
    """As `import_folder`, also of a folder of `Sam2Model`; and the parts ("memory_encoder", ...)
    of the network that the folder lacks. The sizes of these are the published ones.

    Raises:
      FamilyError, MappingError: name what does not fit.
    """
    path = epath.Path(path)
    if not (path / "config.json").exists():
        raise MissingFile(
            f"{path / 'config.json'}: missing; give the folder of SAM 2 as `transformers` saves it "
            f'(model_type "{MODEL_TYPE}")'
        )
    about = json.loads((path / "config.json").read_text())
    config, tensors = sam2_config(about), read_tensors(path)
    if about.get("model_type") != IMAGE_TYPE:
        return config, import_leaves(sam2_rows(config), tensors, IGNORED), []
    missing = dict.fromkeys(row.ours.split("/")[0] for row in memory_rows(config, ""))
    return config, import_leaves(image_rows(config, ""), tensors), list(missing)


def export_folder(out: epath.PathLike, config: Sam2Config, leaves: Mapping[str, Any]) -> None:
    """The inverse of `import_folder`, without its config.json."""
    write_tensors(epath.Path(out), export_leaves(sam2_rows(config), leaves))


def split_network(
    out: epath.Path, config: Sam2Config, leaves: Mapping[str, Any], like: epath.PathLike
) -> dict[str, Any]:
    """Writes a model's network as the folder of SAM 2 that `like` is, with its small files and the
    tensor that nothing reads; returns the other leaves.

    Args:
      config: of the model.
      leaves: of the model, by their whole paths.

    Raises:
      FamilyError: `like` is of another size.
    """
    published, _ = import_folder(like)
    if dataclasses.replace(config, remat=published.remat) != published:
        raise FamilyError(f"the model: sam2 is {config}, but {like} is {published}")
    network = {path: leaf for path, leaf in leaves.items() if path.startswith(PREFIX)}
    tensors = read_tensors(like)
    carried = {name: tensors[name] for name in IGNORED if name in tensors}
    out.mkdir()
    write_tensors(out, export_leaves(sam2_rows(config, PREFIX), network) | carried)
    for name, content in side_files(epath.Path(like)).items():
        (out / name).write_bytes(content)
    return {path: leaf for path, leaf in leaves.items() if path not in network}


def sam2_config(config: Mapping[str, Any]) -> Sam2Config:
    """Sam2Config of config.json.

    Raises:
      FamilyError: another model_type, or an option that all published checkpoints agree on has
        another value.
    """
    kind = config.get("model_type", MODEL_TYPE)
    if kind not in (MODEL_TYPE, IMAGE_TYPE):
        raise FamilyError(
            f"config.json: model_type={kind!r}: expected {MODEL_TYPE!r}, or {IMAGE_TYPE!r} of a "
            "network without memory; give a folder that `Sam2VideoModel` or `Sam2Model` saved"
        )
    vision, decoder = said(config, "vision_config"), said(config, "mask_decoder_config")
    prompts, backbone = said(config, "prompt_encoder_config"), said(vision, "backbone_config")
    _same(config, vision, decoder, prompts, backbone)
    side = said(prompts if kind == IMAGE_TYPE else config, "image_size")
    return Sam2Config(
        image_size=side if isinstance(side, int) else side[0],
        widths=tuple(said(backbone, "embed_dim_per_stage")),
        depths=tuple(said(backbone, "blocks_per_stage")),
        heads=tuple(said(backbone, "num_attention_heads_per_stage")),
        windows=tuple(said(backbone, "window_size_per_stage")),
        global_blocks=tuple(said(backbone, "global_attention_blocks")),
        position_grid=said(backbone, "window_positional_embedding_background_size")[0],
        width=said(vision, "fpn_hidden_size"),
        decoder_heads=said(decoder, "num_attention_heads"),
        decoder_mlp_width=said(decoder, "mlp_dim"),
        mask_channels=said(prompts, "mask_input_channels"),
        iou_width=said(decoder, "iou_head_hidden_dim"),
        **(_published_memory() if kind == IMAGE_TYPE else _memory(config)),
        remat="full",
    )


def _memory(config: Mapping[str, Any]) -> dict[str, Any]:
    return {field: said(config, option) for field, option in _MEMORY.items()}


def _published_memory() -> dict[str, Any]:
    """Of SAM 2.1, in all of whose sizes it is the same."""
    return {field: getattr(PUBLISHED["tiny"], field) for field in _MEMORY}


def _same(
    config: Mapping, vision: Mapping, decoder: Mapping, prompts: Mapping, backbone: Mapping
) -> None:
    """Refuses what the code takes for granted and a configuration has otherwise."""
    width = vision["fpn_hidden_size"]
    granted = (
        (config, {
            "sigmoid_scale_for_mem_enc": 20.0, "sigmoid_bias_for_mem_enc": -10.0,
            "multimask_output_in_sam": True, "multimask_min_pt_num": 0, "multimask_max_pt_num": 1,
            "multimask_output_for_tracking": True, "memory_attention_hidden_size": width,
            "memory_attention_num_attention_heads": 1, "memory_attention_downsample_rate": 1,
            "memory_attention_feed_forward_hidden_act": "relu",
            "memory_encoder_hidden_size": width, "mask_downsampler_embed_dim": width,
            "mask_downsampler_kernel_size": 3, "mask_downsampler_stride": 2,
            "mask_downsampler_padding": 1, "mask_downsampler_total_stride": 16,
            "mask_downsampler_hidden_act": "gelu", "memory_fuser_embed_dim": width,
            "memory_fuser_kernel_size": 7, "memory_fuser_padding": 3,
            "memory_fuser_hidden_act": "gelu", "max_cond_frame_num": -1,
        }),
        (vision, {
            "fpn_kernel_size": 1, "fpn_stride": 1, "fpn_padding": 0, "fpn_top_down_levels": [2, 3],
            "num_feature_levels": 3,
        }),
        (decoder, {
            "hidden_size": width, "hidden_act": "gelu", "num_hidden_layers": 2,
            "attention_downsample_rate": 2, "num_multimask_outputs": 3, "iou_head_depth": 3,
            "dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        }),
        (prompts, {
            "hidden_size": width, "patch_size": 16, "num_point_embeddings": 4, "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        }),
        (backbone, {
            "num_channels": 3, "patch_kernel_size": [7, 7], "patch_stride": [4, 4],
            "patch_padding": [3, 3], "query_stride": [2, 2], "num_query_pool_stages": STAGES - 1,
            "mlp_ratio": 4.0, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        }),
    )  # fmt: skip
    for part, values in granted:
        for key, value in values.items():
            only(part, key, value)
    rope = config.get("rope_parameters") or {}
    only(rope, "rope_theta", 10000.0)
    only(rope, "rope_type", "axial")
    sides = backbone["window_positional_embedding_background_size"]
    if len(set(sides)) != 1:
        raise FamilyError(
            f"backbone_config.window_positional_embedding_background_size={sides}: this program "
            "has square tables"
        )


def sam2_rows(config: Sam2Config, ours: str = "") -> list[Row]:
    """Rows of the whole network; `ours` is the prefix of its leaves, with a "/" at its end."""
    return [*image_rows(config, ours), *memory_rows(config, ours)]


def image_rows(config: Sam2Config, ours: str) -> list[Row]:
    """What finds objects in a frame by itself: all that `Sam2Model` has."""
    return [
        Row(f"{ours}image_positions/frequencies", "shared_image_embedding.positional_embedding"),
        Row(f"{ours}no_memory", "no_memory_embedding"),
        *image_encoder_rows(config, f"{ours}image_encoder", "vision_encoder"),
        *prompt_encoder_rows(f"{ours}prompt_encoder", "prompt_encoder"),
        *mask_decoder_rows(f"{ours}mask_decoder", "mask_decoder"),
    ]


def memory_rows(config: Sam2Config, ours: str) -> list[Row]:
    """What follows objects from frame to frame: what `Sam2VideoModel` has beyond `Sam2Model`."""
    rows = [
        *memory_attention_rows(f"{ours}memory_attention", "memory_attention"),
        *memory_encoder_rows(f"{ours}memory_encoder", "memory_encoder"),
        Row(f"{ours}memory_times", "memory_temporal_positional_encoding"),
        Row(f"{ours}no_pointer", "no_object_pointer"),
        *conv(f"{ours}mask_downsample", "mask_downsample"),
        *feed_forward(f"{ours}pointer_mlp", "object_pointer_proj"),
    ]
    if config.pointer_times:
        theirs = "temporal_positional_encoding_projection_layer"
        rows += linear(f"{ours}pointer_time", theirs)
    if config.occlusion_embedding:
        rows.append(Row(f"{ours}occlusion", "occlusion_spatial_embedding_parameter"))
    return rows


def conv(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def feed_forward(ours: str, theirs: str) -> list[Row]:
    names = (("proj_in", "proj_in"), ("hidden", "layers.0"), ("proj_out", "proj_out"))
    return [row for our, their in names for row in linear(f"{ours}/{our}", f"{theirs}.{their}")]


def attention(ours: str, theirs: str) -> list[Row]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [row for name in names for row in linear(f"{ours}/{name}", f"{theirs}.{name}")]


def image_encoder_rows(config: Sam2Config, ours: str, theirs: str) -> list[Row]:
    body, key = f"{ours}/backbone", f"{theirs}.backbone"
    rows = [
        *conv(f"{body}/patch_embedding", f"{key}.patch_embed.projection"),
        Row(f"{body}/position", f"{key}.pos_embed"),
        Row(f"{body}/window_position", f"{key}.pos_embed_window"),
    ]
    block = 0
    for stage, depth in enumerate(config.depths):
        # Their neck starts with the last stage.
        rows += conv(f"{ours}/neck/stage{stage}", f"{theirs}.neck.convs.{STAGES - 1 - stage}")
        name, end = f"{body}/stages/stage{stage}", block + depth
        if stage > 0:
            rows += hiera_block(f"{name}/first", f"{key}.blocks.{block}")
            rows += linear(f"{name}/first/proj", f"{key}.blocks.{block}.proj")
            block += 1
        if block < end:
            rows += [
                Row(row.ours, row.theirs, row.transpose, first=block, count=end - block)
                for row in hiera_block(f"{name}/blocks", key + ".blocks.{layer}")
            ]
        block = end
    return rows


def hiera_block(ours: str, theirs: str) -> list[Row]:
    return [
        *norm(f"{ours}/layer_norm1", f"{theirs}.layer_norm1"),
        *linear(f"{ours}/qkv", f"{theirs}.attn.qkv"),
        *linear(f"{ours}/o_proj", f"{theirs}.attn.proj"),
        *norm(f"{ours}/layer_norm2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/fc1", f"{theirs}.mlp.proj_in"),
        *linear(f"{ours}/fc2", f"{theirs}.mlp.proj_out"),
    ]


def prompt_encoder_rows(ours: str, theirs: str) -> list[Row]:
    mask, key = f"{ours}/mask_embedding", f"{theirs}.mask_embed"
    return [
        Row(f"{ours}/positions/frequencies", f"{theirs}.shared_embedding.positional_embedding"),
        Row(f"{ours}/labels", f"{theirs}.point_embed.weight"),
        Row(f"{ours}/filling", f"{theirs}.not_a_point_embed.weight"),
        Row(f"{ours}/no_mask", f"{theirs}.no_mask_embed.weight"),
        *conv(f"{mask}/conv1", f"{key}.conv1"),
        *norm(f"{mask}/layer_norm1", f"{key}.layer_norm1"),
        *conv(f"{mask}/conv2", f"{key}.conv2"),
        *norm(f"{mask}/layer_norm2", f"{key}.layer_norm2"),
        *conv(f"{mask}/conv3", f"{key}.conv3"),
    ]


def mask_decoder_rows(ours: str, theirs: str) -> list[Row]:
    rows = [
        Row(f"{ours}/presence_token", f"{theirs}.obj_score_token.weight"),
        Row(f"{ours}/iou_token", f"{theirs}.iou_token.weight"),
        Row(f"{ours}/mask_tokens", f"{theirs}.mask_tokens.weight"),
        *attention(f"{ours}/final_attn", f"{theirs}.transformer.final_attn_token_to_image"),
        *norm(f"{ours}/final_norm", f"{theirs}.transformer.layer_norm_final_attn"),
        *conv(f"{ours}/fine_conv", f"{theirs}.conv_s0"),
        *conv(f"{ours}/middle_conv", f"{theirs}.conv_s1"),
        *conv(f"{ours}/upscale1", f"{theirs}.upscale_conv1"),
        *norm(f"{ours}/upscale_norm", f"{theirs}.upscale_layer_norm"),
        *conv(f"{ours}/upscale2", f"{theirs}.upscale_conv2"),
        *feed_forward(f"{ours}/mask_mlps", theirs + ".output_hypernetworks_mlps.{layer}"),
        *feed_forward(f"{ours}/iou_mlp", f"{theirs}.iou_prediction_head"),
        *feed_forward(f"{ours}/presence_mlp", f"{theirs}.pred_obj_score_head"),
    ]
    for number in range(2):
        layer, key = f"{ours}/layers/layer{number}", f"{theirs}.transformer.layers.{number}"
        rows += [
            *attention(f"{layer}/self_attn", f"{key}.self_attn"),
            *attention(f"{layer}/token_to_image", f"{key}.cross_attn_token_to_image"),
            *attention(f"{layer}/image_to_token", f"{key}.cross_attn_image_to_token"),
            *linear(f"{layer}/fc1", f"{key}.mlp.proj_in"),
            *linear(f"{layer}/fc2", f"{key}.mlp.proj_out"),
        ]
        for norm_number in range(1, 5):
            name = f"layer_norm{norm_number}"
            rows += norm(f"{layer}/{name}", f"{key}.{name}")
    return rows


def memory_attention_rows(ours: str, theirs: str) -> list[Row]:
    reading, key = f"{ours}/layers", theirs + ".layers.{layer}"
    rows = [
        *norm(f"{ours}/final_norm", f"{theirs}.layer_norm"),
        *attention(f"{reading}/self_attn", f"{key}.self_attn"),
        *attention(f"{reading}/cross_attn", f"{key}.cross_attn_image"),
        *linear(f"{reading}/linear1", f"{key}.linear1"),
        *linear(f"{reading}/linear2", f"{key}.linear2"),
    ]
    for number in range(1, 4):
        rows += norm(f"{reading}/layer_norm{number}", f"{key}.layer_norm{number}")
    return rows


def memory_encoder_rows(ours: str, theirs: str) -> list[Row]:
    fuser = theirs + ".memory_fuser.layers.{layer}"
    rows = [
        *conv(f"{ours}/feature_projection", f"{theirs}.feature_projection"),
        *conv(f"{ours}/projection", f"{theirs}.projection"),
        *conv(f"{ours}/fuser/depthwise_conv", f"{fuser}.depthwise_conv"),
        *norm(f"{ours}/fuser/layer_norm", f"{fuser}.layer_norm"),
        *linear(f"{ours}/fuser/fc1", f"{fuser}.pointwise_conv1"),
        *linear(f"{ours}/fuser/fc2", f"{fuser}.pointwise_conv2"),
        Row(f"{ours}/fuser/scale", f"{fuser}.scale"),
    ]
    masks, key = f"{ours}/mask_downsampler", f"{theirs}.mask_downsampler"
    rows += conv(f"{masks}/final_conv", f"{key}.final_conv")
    for number in range(4):
        rows += conv(f"{masks}/convs/layer{number}", f"{key}.layers.{number}.conv")
        rows += norm(f"{masks}/norms/layer{number}", f"{key}.layers.{number}.layer_norm")
    return rows
