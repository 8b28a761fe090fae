"""The language model in the Hugging Face layout: config.json, tensors, tokenizer, chat template."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from tpo_jax.data.text import TextCodec
from tpo_jax.models.config import LanguageConfig

# transformers renders it with `messages`; it gives the same text as data.text.ChatTemplate does for
# a conversation without a video, whose embeddings tpo_torch.py puts between the two tokens.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def language_config_to_huggingface(config: LanguageConfig, codec: TextCodec) -> dict[str, Any]:
    """config.json of LlamaForCausalLM, or of Qwen2ForCausalLM where q, k and v have a bias."""
    kind = "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": config.tied_head,
        "dtype": "float32",
        "pad_token_id": codec.special_ids["<pad>"],
        "bos_token_id": codec.special_ids["<bos>"],
        "eos_token_id": codec.special_ids["<eos>"],
    }


def write_tokenizer(directory: epath.Path, codec: TextCodec) -> None:
    """tokenizer.json and tokenizer_config.json, which `AutoTokenizer` reads."""
    (directory / "tokenizer.json").write_text(codec.tokenizer.to_str(pretty=True))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
