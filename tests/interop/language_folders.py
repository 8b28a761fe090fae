"""Published layouts of tiny random language models, written without torch."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tpo_jax.data.text import train_tokenizer

# Logits of `transformers`; `python -m tests.parity.test_language_families` writes them.
GOLDEN = pathlib.Path(__file__).parent / "language_logits.npz"
GOLDEN_EVERY = 8  # one logit in so many is kept
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON = {
    "hidden_act": "silu", "num_hidden_layers": 3, "intermediate_size": 40, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "vocab_size": 331,
}  # fmt: skip
# Six query heads over three key/value heads, which no even mesh divides.
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
CONFIGS = {
    "llama": {
        "model_type": "llama", "hidden_size": 48, **_HEADS, "tie_word_embeddings": False,
        "attention_bias": True, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {
        "model_type": "mistral", "hidden_size": 32, **_HEADS, "head_dim": 72,
        "tie_word_embeddings": False, "rope_theta": 1000000.0, "sliding_window": 5,
        "rope_scaling": {"type": "linear", "factor": 2.5},
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 48, **_HEADS, "tie_word_embeddings": True,
        "rope_theta": 1000000.0, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 32, **_HEADS, "head_dim": 24,
        "tie_word_embeddings": False, "rope_theta": 10000.0,
        "max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}  # fmt: skip


def write_folder(
    folder: pathlib.Path | str, name: str, files: int = 2, dtype=np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """A folder as it is downloaded; returns the tensors in it."""
    folder, config = pathlib.Path(folder), {**_COMMON, **CONFIGS[name]}
    tensors = random_tensors(config, dtype, seed)
    folder.mkdir(parents=True)
    weight_map = {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[index::files])
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return tensors


def write_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = train_tokenizer(["a red circle moves", "it is blue"], 300)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<pad>", "chat_template": CHATML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


def random_tensors(config: dict, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by the names and shapes of `transformers`."""
    random = np.random.default_rng(seed)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    query, kv = (config[f"num_{n}_heads"] * head for n in ("attention", "key_value"))
    family = config["model_type"]
    out_bias = bool(config.get("attention_bias"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, (rows, columns) in {
            "q_proj": (query, width), "k_proj": (kv, width), "v_proj": (kv, width),
            "o_proj": (width, query),
        }.items():  # fmt: skip
            shapes[f"{at}self_attn.{name}.weight"] = (rows, columns)
            if out_bias or (family == "qwen2" and name != "o_proj"):
                shapes[f"{at}self_attn.{name}.bias"] = (rows,)
        if family == "qwen3":
            shapes |= {f"{at}self_attn.{n}_norm.weight": (head,) for n in "qk"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (width, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return {
        name: ((1.0 if "norm" in name else 0.0) + random.normal(size=shape) * 0.25).astype(dtype)
        for name, shape in shapes.items()
    }


def tokens_of(name: str) -> np.ndarray:
    """int32[1, 24], beyond every window and original length."""
    vocabulary = {**_COMMON, **CONFIGS[name]}["vocab_size"]
    return np.random.default_rng(3).integers(0, vocabulary, (1, 24)).astype(np.int32)
