"""Language models in the Hugging Face layout: config, safetensors, tokenizer, chat template."""

import collections
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import TextCodec
from tpo_jax.errors import UserError
from tpo_jax.interop import precision
from tpo_jax.interop.chat_template import (
    ChatTemplateError,
    chat_template,
    jinja_of,
    read_chat_template,
    read_json,
    special_tokens,
    stop_tokens,
)
from tpo_jax.interop.mapping import Row, check_shapes, import_leaves, llama_rows
from tpo_jax.interop.output import EXPORT_METADATA
from tpo_jax.interop.tensors import (
    LazyArray,
    TensorFileError,
    assign_shards,
    read_file,
    shard_name,
    write_file,
)
from tpo_jax.models.config import VOCABULARY_MULTIPLE, LanguageConfig
from tpo_jax.models.language import abstract
from tpo_jax.models.rope import RopeScaling
from tpo_jax.parallel.paths import flatten

# What a config.json leaves out, by the configuration classes of `transformers`
# (models/*/configuration_*.py): it saves the parts of a larger model as what differs from these.
_SIZES = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
_QWEN = _SIZES | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}  # fmt: skip
_DEFAULTS = {
    "llama": _SIZES | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8,
                         "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}  # fmt: skip
FAMILIES = tuple(_DEFAULTS)
# The published default: a new file where the next tensor would pass it.
SHARD_BYTES = 5 * 10**9
BOS = "<bos>"
# Buffers of older checkpoints.
_IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
# Pickles that a trainer leaves beside its model.
_NO_MODEL = ("training_args", "optimizer", "scheduler", "rng_state")
_WEIGHTS = (
    "*.safetensors", "*.index.json", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.h5",
    "*.msgpack", "*.onnx", "*.py",
)  # fmt: skip


class HuggingFaceError(UserError):
    """A folder or a configuration that cannot be imported; the message names what and the fix."""


@dataclasses.dataclass(frozen=True)
class LanguageSource:
    """A language model in a Hugging Face folder; its weights are read on demand.

    Attributes:
      config: with the vocabulary padded; num_tokens is the published vocabulary.
      dtype: of the computation: that of the weights, float32 for any but bfloat16.
      leaves: {parameter path: array}.
      ignored: tensors of the folder that are left out.
    """

    config: LanguageConfig
    dtype: str
    leaves: dict[str, LazyArray]
    ignored: tuple[str, ...]


def model_type(directory: epath.PathLike) -> str | None:
    """The family that config.json of a Hugging Face folder names; None where there is none."""
    return read_json(epath.Path(directory) / "config.json").get("model_type")


def open_language(directory: epath.PathLike) -> LanguageSource:
    """Opens a folder of one of FAMILIES; reads its configuration and headers.

    Raises:
      HuggingFaceError, MappingError, TensorFileError: name what does not fit.
    """
    path = epath.Path(directory)
    config = language_config(read_json(path / "config.json"), f"{path / 'config.json'}")
    tensors = read_tensors(path)
    rows = language_rows(config, config.num_tokens, tensors)
    leaves = import_leaves(rows, tensors, _IGNORED)
    wanted = flatten({"language": abstract(config)})
    check_shapes(f"{path}", rows, leaves, {name: x.shape for name, x in wanted.items()})
    # A copy of a tied table, which some checkpoints have, does not go back out.
    used = {key for row in rows for key in row.inward(tensors)[1] if key not in row.same}
    dtype = "bfloat16" if leaves["language/embed/table"].dtype.name == "bfloat16" else "float32"
    return LanguageSource(config, dtype, leaves, tuple(sorted(tensors.keys() - used)))


def open_codec(directory: epath.PathLike, jinja: str | None = None) -> TextCodec:
    """Tokenizer and chat template of a Hugging Face folder.

    Args:
      jinja: text of a chat template, where the folder has none.
    """
    path = epath.Path(directory)
    tokenizer = read_tokenizer(path)
    jinja = jinja or read_chat_template(path)
    if jinja is None:
        raise ChatTemplateError(
            f"{path}: has no chat_template; give one with --chat_template=FILE.jinja"
        )
    special = special_tokens(path)
    if "eos_token" not in special:
        raise HuggingFaceError(f"{path / 'tokenizer_config.json'}: names no eos_token; add it")
    template = chat_template(jinja, special, tokenizer, str(path))
    stops = stop_tokens(path, tokenizer, template.end)
    return TextCodec(tokenizer, dataclasses.replace(template, stops=stops))


def read_tokenizer(path: epath.Path) -> Tokenizer:
    """Of tokenizer.json; where it is missing, HuggingFaceError has the lines that write it."""
    file = path / "tokenizer.json"
    if not file.exists():
        raise HuggingFaceError(
            f"{file}: missing; write it where transformers is installed:\n"
            "  from transformers import AutoTokenizer\n"
            f"  AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')"
        )
    return Tokenizer.from_str(file.read_text())


def read_tensors(directory: epath.PathLike) -> dict[str, LazyArray]:
    """{name: array} of all safetensors of a folder.

    Raises:
      HuggingFaceError: only pickles are there; the message converts them.
      TensorFileError: a file is missing or is not what the index says.
    """
    path = epath.Path(directory)
    index = read_json(path / "model.safetensors.index.json").get("weight_map")
    if index is None and not (path / "model.safetensors").exists():
        pickles = sorted(f.name for p in ("*.bin", "*.pth", "*.pt") for f in path.glob(p))
        pickles = [name for name in pickles if not name.startswith(_NO_MODEL)]
        raise HuggingFaceError(pickle_message(path, pickles) if pickles else (
            f"{path}: has no model.safetensors and no model.safetensors.index.json; copy the "
            "folder again"
        ))  # fmt: skip
    files = sorted(set(index.values())) if index else ["model.safetensors"]
    arrays: dict[str, LazyArray] = {}
    for file in files:
        if not (path / file).exists():
            raise TensorFileError(f"{path / file}: missing, but the index names it; copy it again")
        for name, array in read_file(path / file).items():
            if index and index.get(name) != file:
                raise TensorFileError(
                    f"{path / file}: holds {name}, which the index has in {index.get(name)}"
                )
            arrays[name] = array
    if absent := sorted(set(index or ()) - set(arrays)):
        raise TensorFileError(f"{path}: the index names tensors that no file has: {absent}")
    return arrays


def pickle_message(
    path: epath.Path, pickles: Sequence[str], out: str = "model.safetensors"
) -> str:
    """Why a folder's pickles are not opened, and lines that write them to its file `out`."""
    return (
        f"{path}: holds {', '.join(pickles)}, which are pickles, and this program opens none: one "
        "can run any code. Convert them where you have torch and safetensors:\n\n"
        "  import torch\n"
        "  from safetensors.torch import save_file\n"
        "  tensors = {}\n"
        f"  for name in {list(pickles)}:\n"
        f"      tensors |= torch.load(f'{path}/{{name}}', map_location='cpu', weights_only=True)\n"
        "  tensors = {name: x.clone().contiguous() for name, x in tensors.items()}\n"
        f"  save_file(tensors, '{path}/{out}', metadata={{'format': 'pt'}})\n"
    )


def side_files(path: epath.Path) -> dict[str, bytes]:
    """Every file of a folder, without those in folders below it, that holds no weights and no code:
    they go back out as they are."""
    names = {file.name for file in path.iterdir() if not file.is_dir()}
    for pattern in _WEIGHTS:
        names -= {file.name for file in path.glob(pattern)}
    return {name: (path / name).read_bytes() for name in sorted(names) if name[0] != "."}


def language_rows(
    config: LanguageConfig, vocabulary: int, stored: Collection[str] = ()
) -> list[Row]:
    """The table between `config`'s parameters and a Hugging Face model of so many tokens.

    Args:
      stored: tensor names of a folder that is read.
    """
    return llama_rows(
        tied=config.tied_head, qkv_bias=config.qkv_bias, output_bias=config.output_bias,
        qk_norm=config.qk_norm, vocabulary=(vocabulary, config.vocab_size), stored=stored,
    )  # fmt: skip


def language_config(data: Mapping[str, Any], where: str = "config.json") -> LanguageConfig:
    """LanguageConfig of a published config.json.

    What a file leaves out has the default of its class in `transformers`.

    Raises:
      HuggingFaceError: another family, or an option that this program does not have, by name.
    """

    def refuse(option: str, value: Any, reason: str) -> None:
        raise HuggingFaceError(f"{where}: {option}={value!r}: {reason}")

    family = data.get("model_type")
    if family not in FAMILIES:
        refuse("model_type", family, f"this program has {', '.join(FAMILIES)}")
    for option, only in (
        ("hidden_act", "silu"), ("mlp_bias", False), ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):  # fmt: skip
        if data.get(option, only) not in (only, None):
            refuse(option, data[option], f"this program has only {only!r}")
    data = collections.ChainMap(data, _DEFAULTS[family])
    heads = data["num_attention_heads"]
    theta, scaling = _rope(data, refuse)
    window, full_layers = _window(data, refuse)
    all_biases = family in ("llama", "qwen3") and bool(data.get("attention_bias"))
    vocabulary = data["vocab_size"]
    return LanguageConfig(
        vocab_size=-(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        num_tokens=vocabulary,
        width=data["hidden_size"],
        depth=data["num_hidden_layers"],
        heads=heads,
        kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        mlp_width=data["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=data.get("rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2" or all_biases,
        output_bias=all_biases,
        qk_norm=family == "qwen3",
        sliding_window=window,
        full_layers=full_layers,
        tied_head=data.get("tie_word_embeddings", False),
    )


def _rope(data: Mapping[str, Any], refuse: Any) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling, which newer files join to rope_parameters."""
    given = dict(data.get("rope_scaling") or data.get("rope_parameters") or {})
    theta = float(given.pop("rope_theta", data.get("rope_theta", 10000.0)))
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        refuse("rope_scaling.partial_rotary_factor", "", "this program turns whole heads")
    if kind == "default":
        return theta, None
    names = {
        "linear": {},
        "dynamic": {"original_max_position_embeddings": None},
        "yarn": {
            "original_max_position_embeddings": "original_length", "beta_fast": "beta_fast",
            "beta_slow": "beta_slow", "attention_factor": "attention_factor",
            "truncate": "truncate",
        },
        "llama3": {
            "original_max_position_embeddings": "original_length",
            "low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency",
        },
    }  # fmt: skip
    if kind not in names:
        refuse("rope_scaling.rope_type", kind, f"this program has {', '.join(names)}")
    length = data.get("max_position_embeddings")
    values = {"kind": kind, "factor": given.pop("factor", None)}
    if values["factor"] is None:
        refuse("rope_scaling.factor", None, "is missing")
    if kind != "linear":
        values["original_length"] = length
    for name, value in given.items():
        if name not in names[kind]:
            refuse(f"rope_scaling.{name}", value, f"unknown to {kind!r}, which has "
                   f"{sorted(names[kind])}")  # fmt: skip
        if names[kind][name] and value is not None:
            values[names[kind][name]] = value
    return theta, RopeScaling(**values)


def _window(data: Mapping[str, Any], refuse: Any) -> tuple[int | None, int]:
    """Sliding window and how many first layers see everything."""
    family, depth = data["model_type"], data["num_hidden_layers"]
    if family == "llama":
        return None, 0
    window = data.get("sliding_window", 4096)
    if family == "mistral":
        return window, 0
    if not data.get("use_sliding_window", False) or window is None:
        return None, 0
    kinds = data.get("layer_types")
    if kinds is None:
        return window, min(data.get("max_window_layers", 28), depth)
    full = kinds.count("full_attention")
    if kinds != ["full_attention"] * full + ["sliding_attention"] * (depth - full):
        refuse("layer_types", kinds, "this program lets the first layers see everything and the "
               "others slide")  # fmt: skip
    return window, full


def huggingface_config(
    config: LanguageConfig, vocabulary: int, published: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json for `transformers`; the inverse of `language_config`.

    Args:
      vocabulary: rows of the exported token tables.
      published: config.json that the model came with; what this program does not have stays.

    Raises:
      HuggingFaceError: no published family has this combination of options.
    """
    family = (published or {}).get("model_type") or _family(config)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    out = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": _positions(config),
        "tie_word_embeddings": config.tied_head,
    }
    if config.rope_scaling is not None:
        out["rope_scaling"] = _rope_scaling(config.rope_scaling)
    if family in ("llama", "qwen3"):
        out["attention_bias"] = config.qkv_bias
    if family in ("mistral", "qwen2", "qwen3"):
        out["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = config.sliding_window is not None
        out["max_window_layers"] = (
            config.depth if config.sliding_window is None else config.full_layers
        )
    out = {k: v for k, v in (published or {}).items() if not k.startswith("rope_")} | out
    meant = dataclasses.replace(
        config, num_tokens=vocabulary, dropout=0.0, remat="", unroll=False, attention="auto"
    )
    if language_config(out) != meant:
        raise HuggingFaceError(
            f"model config: language={config}: no model of {', '.join(FAMILIES)} is like this"
        )
    return out


def _family(config: LanguageConfig) -> str:
    """The simplest family that has what the model has."""
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.output_bias:
        return "qwen2"
    if config.sliding_window is not None:
        return "mistral"
    return "llama"


def _positions(config: LanguageConfig) -> int:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return 32768
    return scaling.original_length * (1 if scaling.kind == "dynamic" else math.ceil(scaling.factor))


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        out["low_freq_factor"] = scaling.low_frequency
        out["high_freq_factor"] = scaling.high_frequency
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        out |= {"truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            out["attention_factor"] = scaling.attention_factor
    return out


def write_tensors(
    directory: epath.Path, tensors: Mapping[str, LazyArray], limit: int | None = None
) -> None:
    """model.safetensors, or numbered files of at most `limit` bytes and their index."""
    shards = assign_shards(tensors, limit or SHARD_BYTES)
    if len(shards) == 1:
        write_file(directory / "model.safetensors", tensors, EXPORT_METADATA)
        return
    where = {}
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        write_file(directory / file, {name: tensors[name] for name in names}, EXPORT_METADATA)
        where |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )


def token_names(codec: TextCodec) -> dict[str, str]:
    """pad_token, eos_token and, where there is one, bos_token of a codec."""
    names = {"pad_token": codec.pad_id, "eos_token": codec.eos_id}
    if BOS in codec.special_ids:
        names["bos_token"] = codec.special_ids[BOS]
    return {name: codec.tokenizer.id_to_token(number) for name, number in names.items()}


def write_tokenizer(directory: epath.Path, codec: TextCodec) -> None:
    """tokenizer.json and tokenizer_config.json, which `AutoTokenizer` reads."""
    (directory / "tokenizer.json").write_text(codec.tokenizer.to_str(pretty=True))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **token_names(codec),
            "chat_template": jinja_of(codec.template),
            "clean_up_tokenization_spaces": False,
        },
    )


def keep_dtype(
    path: epath.Path, tensors: Mapping[str, LazyArray], published: Mapping[str, LazyArray],
    chosen: bool,
) -> None:  # fmt: skip
    """Makes a config.json name the dtype of the tensors beside it, which `transformers` loads in.

    A published one stays as it came where its tensors did, by their dtype and by nobody's choice.

    Args:
      published: tensors that it came with.
      chosen: whether somebody chose the dtype.
    """
    written = precision.dtype_of(tensors)
    before = precision.dtype_of({k: x for k, x in published.items() if k in tensors})
    config = json.loads(path.read_text())
    if (chosen or written != before) and precision.said_dtype(config) != written:
        write_json(path, precision.with_dtype(config, written))


def write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
