"""A model folder as something PyTorch users open, and back again.

    language_model/            what `transformers` loads: config, safetensors, tokenizer, template
    tpo.safetensors            everything else, named by parameter path
    tpo_config.json            ModelConfig, the template and which leaves are where
    preprocessor_config.json   how frames become input
    tpo_torch.py               runs encoder, task tokens and heads on these files
"""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import ChatTemplate, TextCodec
from tpo_jax.interop import huggingface
from tpo_jax.interop.folder import load_model, preprocessor, save_model
from tpo_jax.interop.mapping import Row, export_leaves, import_leaves, llama_rows
from tpo_jax.models import lora
from tpo_jax.models.config import LanguageConfig, ModelConfig
from tpo_jax.parallel.paths import flatten, unflatten

FORMAT_VERSION = 1
_RUNTIME = "tpo_torch.py"
RUNTIME_HEADS = ("region", "temporal", "cg_detr", "mask")  # that the PyTorch file runs


class ExportFolderError(ValueError):
    """An exported folder that is incomplete or was written by another version."""


def _language_rows(config: LanguageConfig) -> list[Row]:
    return llama_rows(tied=config.tied_head, qkv_bias=config.qkv_bias)


def export_model(model: epath.PathLike, out: epath.PathLike) -> list[str]:
    """Writes the exported folder; returns the names in it.

    LoRA adapters are merged into their kernels. The folder appears whole or not at all.
    """
    config, params, codec = load_model(model)
    if unknown := [name for name in config.heads if name not in RUNTIME_HEADS]:
        raise ExportFolderError(
            f"{model}: model.heads: {unknown} cannot be exported, {_RUNTIME} runs only "
            f"{list(RUNTIME_HEADS)}; add them there and to RUNTIME_HEADS, or train without them"
        )
    if config.lora is not None:
        params = lora.merge(params, config.lora)
        config = dataclasses.replace(config, lora=None)
    leaves = flatten(params)
    language = {path: leaf for path, leaf in leaves.items() if path.startswith("language/")}
    rest = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()
            if path not in language}  # fmt: skip

    final = epath.Path(out)
    temporary = final.with_name(final.name + ".tmp")
    if temporary.exists():
        temporary.rmtree()
    (temporary / "language_model").mkdir(parents=True)
    tensors = export_leaves(_language_rows(config.language), language)
    _save(temporary / "language_model" / "model.safetensors", tensors)
    huggingface.write_json(
        temporary / "language_model" / "config.json",
        huggingface.language_config_to_huggingface(config.language, codec),
    )
    huggingface.write_tokenizer(temporary / "language_model", codec)
    _save(temporary / "tpo.safetensors", rest)
    huggingface.write_json(temporary / "preprocessor_config.json", preprocessor(config))
    huggingface.write_json(
        temporary / "tpo_config.json",
        {
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            "template": codec.template.to_json(),
        },
    )
    shutil.copyfile(epath.resource_path("tpo_jax") / "interop" / "torch_runtime" / _RUNTIME,
                    temporary / _RUNTIME)  # fmt: skip
    if final.exists():
        final.rmtree()
    temporary.rename(final)
    return sorted(path.name for path in final.iterdir())


def import_model(source: epath.PathLike, out: epath.PathLike) -> ModelConfig:
    """Reads an exported folder back into a model folder, bit for bit.

    Raises:
      ExportFolderError: not an exported folder, or one of another format version.
      MappingError: a tensor is missing, or one that no leaf uses is there.
    """
    path = epath.Path(source)
    about = _read_config(path)
    config = ModelConfig.from_dict(about["model"])
    tensors = safetensors.numpy.load((path / "language_model/model.safetensors").read_bytes())
    leaves = import_leaves(_language_rows(config.language), tensors)
    leaves |= safetensors.numpy.load((path / "tpo.safetensors").read_bytes())
    tokenizer = Tokenizer.from_str((path / "language_model" / "tokenizer.json").read_text())
    codec = TextCodec(tokenizer, ChatTemplate.from_json(about["template"]))
    save_model(out, config, unflatten(leaves), codec)
    return config


def largest_difference(a: epath.PathLike, b: epath.PathLike) -> float:
    """Largest absolute difference between two model folders over all leaves.

    Raises:
      ExportFolderError: the folders do not have the same leaves.
    """
    left, right = (flatten(load_model(folder)[1]) for folder in (a, b))
    if left.keys() != right.keys():
        raise ExportFolderError(f"{a} and {b}: leaves {sorted(left.keys() ^ right.keys())} differ")
    return max(
        float(np.max(np.abs(left[path].astype(np.float64) - right[path].astype(np.float64))))
        for path in left
    )


def _read_config(path: epath.Path) -> dict[str, Any]:
    file = path / "tpo_config.json"
    if not file.exists():
        raise ExportFolderError(
            f"{path}: has no tpo_config.json, so it is not a folder that `convert export` wrote; "
            "other model families cannot be imported yet"
        )
    about = json.loads(file.read_text())
    if about["format_version"] != FORMAT_VERSION:
        raise ExportFolderError(
            f"{file}: format_version {about['format_version']}, this program reads "
            f"{FORMAT_VERSION}; export the model again"
        )
    return about


def _save(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
    # transformers refuses a file without this entry.
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
