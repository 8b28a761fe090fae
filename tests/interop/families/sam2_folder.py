"""A folder of SAM 2 as `transformers` saves it, with random weights; written without torch."""

import json

import numpy as np
from flax import nnx

from tpo_jax.interop.mapping import export_leaves
from tpo_jax.interop.sam2 import IGNORED, sam2_rows
from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.models.heads.sam2.model import Sam2
from tpo_jax.models.layers import Rngs
from tpo_jax.models.sam2_config import SIZES
from tpo_jax.parallel.paths import flatten


def config_json(config):
    """What `interop.sam2.sam2_config` reads, for a Sam2Config."""
    backbone = {
        "embed_dim_per_stage": config.widths, "blocks_per_stage": config.depths,
        "num_attention_heads_per_stage": config.heads, "window_size_per_stage": config.windows,
        "global_attention_blocks": config.global_blocks,
        "window_positional_embedding_background_size": [config.position_grid] * 2,
    }  # fmt: skip
    return {
        "model_type": "sam2_video", "image_size": config.image_size,
        "vision_config": {"backbone_config": backbone, "fpn_hidden_size": config.width},
        "mask_decoder_config": {
            "num_attention_heads": config.decoder_heads, "mlp_dim": config.decoder_mlp_width,
            "iou_head_hidden_dim": config.iou_width, "hidden_size": config.width,
        },
        "prompt_encoder_config": {
            "mask_input_channels": config.mask_channels, "hidden_size": config.width,
        },
        "memory_encoder_output_channels": config.memory_width,
        "memory_attention_num_layers": config.memory_layers,
        "memory_attention_feed_forward_hidden_size": config.memory_mlp_width,
        "memory_fuser_num_layers": config.fuser_layers,
        "memory_fuser_intermediate_dim": config.fuser_mlp_width,
        "num_maskmem": config.memories, "max_object_pointers_in_encoder": config.pointers,
        "enable_temporal_pos_encoding_for_object_pointers": config.pointer_times,
        "enable_occlusion_spatial_embedding": config.occlusion_embedding,
    }  # fmt: skip


def write_sam2(path):
    """The micro size, with the tensor that nothing reads and a small file of its own."""
    path.mkdir()
    config = SIZES["micro"]
    network = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Sam2(config, rngs=Rngs(0)))))
    rng = np.random.default_rng(3)
    leaves = {name: rng.normal(size=leaf.shape).astype(np.float32)
              for name, leaf in flatten(network).items()}  # fmt: skip
    tensors = export_leaves(sam2_rows(config), leaves) | {IGNORED[0]: np.ones(3, np.float32)}
    lazily = {name: lazy(tensor) for name, tensor in tensors.items()}
    write_file(path / "model.safetensors", lazily, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_json(config)))
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
