"""config.json of every family at a tiny size, as the published files are written.

With what those do not say, `frames_upbound` of transformers' LLaVA-OneVision and `conv_template` of
`llava_qwen`, as somebody adds it who trains from the folder itself.
"""

TEXT = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6,
}  # fmt: skip
VISION = {
    "image_size": 24, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 36,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
CLIP = {"model_type": "clip_vision_model", **VISION}

LLAVA_ONEVISION = {
    "model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **TEXT},
    "vision_config": SIGLIP, "vision_feature_layer": -1, "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[24, 24], [24, 48], [48, 24], [48, 48]], "frames_upbound": 32,
}  # fmt: skip
# As in the 0.5B: the language model has one table for both ends.
LLAVA_ONEVISION_TIED = LLAVA_ONEVISION | {"tie_word_embeddings": True}
LLAVA_VIDEO = {
    "model_type": "llava_qwen", **TEXT, "vision_config": SIGLIP, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2, "mm_newline_position": "grid",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(2x3)", "frames_upbound": 64, "force_sample": True,
    "add_time_instruction": True, "conv_template": "qwen_1_5",
}  # fmt: skip
LONGVA = {
    "model_type": "llava_qwen", **TEXT, "rope_theta": 1e9, "vision_config": CLIP,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_patch_merge_type": "unires",
    "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2,
    "image_grid_pinpoints": [[24, 24], [48, 24]], "frames_upbound": 32, "force_sample": True,
    "add_time_instruction": False, "conv_template": "qwen_1_5",
}  # fmt: skip
VIDEO_LLAVA = {
    "model_type": "video_llava", "text_config": {"model_type": "llama", **TEXT},
    "vision_config": CLIP, "vision_feature_layer": -2, "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
}  # fmt: skip
VIDEO_LLAVA_ORIGINAL = {
    "model_type": "llava", **TEXT, "vision_config": CLIP, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_image_tower": "LanguageBind/LanguageBind_Image",
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge", "image_aspect_ratio": "pad",
}  # fmt: skip
VIDEOCHAT = {
    "llm_config": {"model_type": "mistral", **TEXT},
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                       "intermediate_size": 24},
    "model_config": {
        "bridge": {"name": "qformer", "num_query_token": 3, "extra_num_query_token": 5},
        "llm": {"name": "mistral_7b", "lora_r": 2, "lora_alpha": 4, "use_lora": True},
        "vision_encoder": {
            "img_size": 24, "patch_size": 8, "encoder_embed_dim": 24, "encoder_depth": 4,
            "encoder_num_heads": 2, "num_frames": 6, "tubelet_size": 1, "return_index": -2,
        },
    },
}  # fmt: skip
CONFIGS = {
    "llava_onevision": LLAVA_ONEVISION, "llava_onevision_tied": LLAVA_ONEVISION_TIED,
    "llava_video": LLAVA_VIDEO, "longva": LONGVA,
    "video_llava": VIDEO_LLAVA, "video_llava_original": VIDEO_LLAVA_ORIGINAL,
    "videochat": VIDEOCHAT,
}  # fmt: skip

# In the style of llava-hf: all videos, then all texts of a turn.
ONEVISION_JINJA = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] != 'text' %}{{ '<' + c['type'] + '>' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ '\\n' + c['text'] }}{% endgeneration %}"
    "{% else %}{{ '\\n' + c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
