"""A model folder as something PyTorch users open, and back again, leaf by leaf.

    language_model/            what `transformers` loads: config, safetensors, tokenizer, template
    tpo.safetensors            everything else, named by parameter path
    tpo_config.json            ModelConfig, the template and which leaves are where
    preprocessor_config.json   how frames become input
    tpo_torch.py               runs encoder, task tokens and heads on these files
    tpo_torch_layers.py        what it computes with
    adapter/                   LoRA adapters in PEFT's layout, where they are kept apart
    sam2/                      network of the head sam2, a folder that `Sam2VideoModel` loads

A language folder becomes the Hugging Face folder itself, and is imported from one.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import ChatTemplate, TextCodec
from tpo_jax.errors import UserError
from tpo_jax.interop import folder, huggingface, output, peft, precision, sam2
from tpo_jax.interop.families import beside
from tpo_jax.interop.folder import SIDE_FILES, preprocessor
from tpo_jax.interop.mapping import export_leaves, import_leaves
from tpo_jax.interop.tensors import LazyArray, write_file
from tpo_jax.models.config import ConnectorConfig, LanguageConfig, ModelConfig, VisionConfig

_RUNTIME = "tpo_torch.py"
RUNTIME_HEADS = ("region", "temporal", "cg_detr", "mask")  # that the PyTorch file runs
_ADAPTER = "adapter"


class ExportFolderError(UserError):
    """An exported folder that is incomplete or was written by another version."""


def export_model(
    model: epath.PathLike, out: epath.PathLike, keep_adapters: bool = False,
    sam2_like: epath.PathLike | None = None, dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Writes the exported folder; returns the names in it.

    LoRA adapters are merged into their kernels, or kept apart where PEFT has a place for all of
    them: in the language model. The folder appears whole or not at all.

    Args:
      sam2_like: folder of SAM 2 in whose layout the network of the head sam2 goes out.
      dtype: of a language folder's weights, one of `precision.DTYPES`; None: as they are.

    Raises:
      ExportFolderError, FamilyError, HuggingFaceError, MappingError, ModelFolderError: name what
        does not fit.
      OutputError: `out` holds something else.
    """
    with output.replacing(out, output.EXPORT, model, sam2_like) as temporary:
        if folder.holds_language_only(model):
            if sam2_like is not None:
                raise ExportFolderError(f"{model}: language model without SAM 2; leave --like out")
            _write_language(epath.Path(model), temporary, dtype)
        else:
            if dtype:
                raise ExportFolderError(
                    f"{model}: --dtype={dtype}: {_RUNTIME} computes in float32; leave it out"
                )
            _write_whole(epath.Path(model), temporary, keep_adapters, sam2_like)
    return sorted(path.name for path in epath.Path(out).iterdir())


def _write_whole(
    model: epath.Path, out: epath.Path, keep_adapters: bool, sam2_like: epath.PathLike | None
) -> None:
    config, codec = folder.load_config(model), folder.load_codec(model)
    own = {"vision": VisionConfig, "connector": ConnectorConfig}
    for part, kind in own.items():
        if not isinstance(getattr(config, part), kind):
            raise ExportFolderError(
                f"{model}: {part}.kind={getattr(config, part).kind!r} cannot be exported by "
                f"itself, {_RUNTIME} runs only this project's own; give the published folder that "
                f"the model came from with {'a --like of its own' if sam2_like else '--like'}"
            )
    _check_heads(model, config, sam2_like)
    if config.heads and config.box_encoder != "own":
        raise ExportFolderError(
            f"{model}: box_encoder={config.box_encoder!r} cannot be exported, {_RUNTIME} runs only "
            "'own'; export with --like, or train without heads"
        )
    leaves = folder.open_leaves(model)
    # Rows of the padded vocabulary travel as well: the tokens of a later head may lie there.
    vocabulary = config.language.vocab_size
    rows = huggingface.language_rows(config.language, vocabulary)
    if config.lora is not None and keep_adapters:
        peft.write_adapter(out / _ADAPTER, leaves, config.lora, rows)
        leaves = peft.without_adapters(leaves)
    elif config.lora is not None:
        leaves = peft.merged_leaves(leaves, config.lora)
        config = dataclasses.replace(config, lora=None)
    language = {path: leaf for path, leaf in leaves.items() if path.startswith("language/")}
    rest = {path: leaf for path, leaf in leaves.items() if path not in language}
    if sam2_like is not None:
        rest = sam2.split_network(out / beside.SAM2, config.sam2, rest, sam2_like)
    write_language_model(out / "language_model", config.language, language, codec)
    write_file(out / beside.TENSORS, rest, {"format": "pt"})
    huggingface.write_json(out / "preprocessor_config.json", preprocessor(config))
    write_about(out, config, codec)
    for file in (epath.resource_path("tpo_jax") / "interop" / "torch_runtime").glob("*.py"):
        (out / file.name).write_bytes(file.read_bytes())


def write_about(out: epath.Path, config: ModelConfig, codec: TextCodec) -> None:
    """tpo_config.json: what the files of `language_model` do not say of a whole model."""
    about = {"model": config.to_dict(), "template": codec.template.to_json()}
    huggingface.write_json(out / beside.CONFIG, {"format_version": beside.FORMAT_VERSION, **about})


def _check_heads(
    model: epath.Path, config: ModelConfig, sam2_like: epath.PathLike | None
) -> None:
    """Refuses heads that have no place in the export, and a SAM 2 that the model does not have."""
    apart = [sam2.NAME] if sam2_like is not None else []
    if unknown := [name for name in config.heads if name not in (*RUNTIME_HEADS, *apart)]:
        fix = "add them there and to RUNTIME_HEADS, or train without them"
        if unknown == [sam2.NAME]:
            fix = "give the folder of SAM 2 that its network came from with --like"
        raise ExportFolderError(
            f"{model}: model.heads: {unknown} cannot be exported, {_RUNTIME} runs only "
            f"{list(RUNTIME_HEADS)}; {fix}"
        )
    if apart and sam2.NAME not in config.heads:
        raise ExportFolderError(
            f"{model}: model.heads: {list(config.heads)}, without {sam2.NAME}, so nothing "
            f"goes out as {sam2_like}; leave --like out"
        )


def write_language_model(
    out: epath.Path, config: LanguageConfig, leaves: Mapping[str, LazyArray], codec: TextCodec,
    dtype: str | None = None,
) -> None:  # fmt: skip
    """A Hugging Face folder of the leaves below language/, without adapters."""
    out.mkdir()
    vocabulary = config.vocab_size
    rows = huggingface.language_rows(config, vocabulary)
    tensors = precision.cast(export_leaves(rows, leaves), dtype)
    huggingface.write_tensors(out, tensors)
    about = huggingface.huggingface_config(config, vocabulary)
    about |= {"dtype": precision.dtype_of(tensors)}
    about |= {
        f"{name}_id": codec.special_ids[token]
        for name, token in huggingface.token_names(codec).items()
    }
    huggingface.write_json(out / "config.json", about)
    ends = {name: value for name, value in about.items() if name.endswith("_token_id")}
    if len(codec.stop_ids) > 1:
        ends["eos_token_id"] = list(codec.stop_ids)
    huggingface.write_json(out / "generation_config.json", ends)
    huggingface.write_tokenizer(out, codec)


def _write_language(model: epath.Path, out: epath.Path, dtype: str | None) -> None:
    """A language folder as the Hugging Face folder that it came from."""
    if huggingface.model_type(model):
        raise ExportFolderError(f"{model}: is in the Hugging Face layout already")
    config, _ = folder.load_language(model)
    rows = huggingface.language_rows(config, config.num_tokens)
    tensors = precision.cast(export_leaves(rows, folder.open_leaves(model)), dtype)
    huggingface.write_tensors(out, tensors)
    for file in (model / SIDE_FILES).iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    codec = TextCodec.load(model)
    if not _same_tokenizer(out / "tokenizer.json", codec):
        (out / "tokenizer.json").write_text(codec.tokenizer.to_str(pretty=True))
    published = json.loads((out / "config.json").read_text())
    if huggingface.language_config(published) != config:
        about = huggingface.huggingface_config(config, config.num_tokens, published)
        huggingface.write_json(out / "config.json", about)
    huggingface.keep_dtype(out / "config.json", tensors, tensors, dtype is not None)


def _same_tokenizer(file: epath.Path, codec: TextCodec) -> bool:
    if not file.exists():
        return False
    return Tokenizer.from_str(file.read_text()).to_str() == codec.tokenizer.to_str()


def import_model(
    source: epath.PathLike,
    out: epath.PathLike,
    chat_template: str | None = None,
    adapter: epath.PathLike | None = None,
    keep_adapters: bool = False,
) -> dict[str, Any]:
    """Reads an exported folder, or a language model's Hugging Face folder, into a model folder.

    Args:
      chat_template: Jinja text, for a Hugging Face folder that has none.
      adapter: PEFT folder to merge into the language model.
      keep_adapters: `adapter` becomes leaves instead; of a whole model alone.

    Returns: what to tell about it: {"kind", "heads", "ignored"}.

    Raises:
      AdapterError: the adapter does not fit, or cannot be kept.
      ExportFolderError, FamilyError: neither of them, or an export of another format version.
      MappingError: a tensor is missing, or one that no leaf uses is there.
      OutputError: `out` holds something else.
    """
    path = epath.Path(source)
    if not (path / beside.CONFIG).exists() and huggingface.model_type(path):
        if keep_adapters:
            raise peft.AdapterError(
                f"{path}: a language model alone has no place for adapters; leave --keep_adapters "
                f"out, which merges {adapter}"
            )
        return _import_language(path, out, chat_template, adapter)
    config, codec = read_about(path)
    if chat_template is not None:
        raise ExportFolderError(f"{path}: has a template of its own; leave --chat_template out")
    rows = huggingface.language_rows(config.language, config.language.vocab_size)
    leaves = import_leaves(rows, huggingface.read_tensors(path / "language_model"))
    leaves |= beside.read_leaves(path, config.heads)
    if config.lora is not None:
        adapters, _ = peft.read_adapter(path / _ADAPTER, rows, leaves)
        leaves = peft.with_adapters(leaves, adapters)
    if adapter is not None and keep_adapters:
        leaves, lora = peft.with_kept(leaves, adapter, rows)
        config = dataclasses.replace(config, lora=lora)
    elif adapter is not None:
        leaves = peft.with_merged(leaves, adapter, rows)
    folder.write_model(
        out, config.to_dict(), leaves, codec, preprocessor=preprocessor(config),
        reads=(path, adapter),
    )  # fmt: skip
    return {"kind": "model", "heads": config.heads, "ignored": ()}


def _import_language(
    path: epath.Path,
    out: epath.PathLike,
    chat_template: str | None,
    adapter: epath.PathLike | None,
) -> dict[str, Any]:
    language = huggingface.open_language(path)
    leaves = language.leaves
    if adapter is not None:
        rows = huggingface.language_rows(language.config, language.config.num_tokens)
        leaves = peft.with_merged(leaves, adapter, rows)
    codec = huggingface.open_codec(path, chat_template)
    about = folder.language_config_dict(language.config, language.dtype)
    side_files = huggingface.side_files(path)
    folder.write_model(out, about, leaves, codec, side_files, reads=(path, adapter))
    return {"kind": huggingface.model_type(path), "heads": (), "ignored": language.ignored}


def largest_difference(a: epath.PathLike, b: epath.PathLike) -> float:
    """Largest absolute difference between two model folders over all leaves.

    Raises:
      ExportFolderError: the folders do not have the same leaves.
    """
    left, right = (folder.open_leaves(path) for path in (a, b))
    if left.keys() != right.keys():
        raise ExportFolderError(f"{a} and {b}: leaves {sorted(left.keys() ^ right.keys())} differ")
    return max(_difference(left[path], right[path]) for path in left)


def _difference(a: LazyArray, b: LazyArray) -> float:
    return max(
        float(np.max(np.abs(x.astype(np.float64) - y.astype(np.float64))))
        for x, y in zip(a.blocks(), b.blocks(), strict=True)
    )


def read_about(path: epath.Path) -> tuple[ModelConfig, TextCodec]:
    """Configuration, tokenizer and template of an exported whole model.

    Raises:
      ExportFolderError, FamilyError: `path` is no such folder, or another version wrote it.
    """
    file = path / beside.CONFIG
    if not file.exists():
        raise ExportFolderError(
            f"{path}: has no tpo_config.json, so it is not a folder that `convert export` wrote, "
            f"and no config.json of {', '.join(huggingface.FAMILIES)}"
        )
    about = beside.read_about(file)
    if "template" not in about:
        raise ExportFolderError(
            f"{file}: lay beside config.json of a multimodal family, which is missing or of no "
            "family that this program has; copy the folder again"
        )
    tokenizer = Tokenizer.from_str((path / "language_model" / "tokenizer.json").read_text())
    codec = TextCodec(tokenizer, ChatTemplate.from_json(about["template"]))
    return ModelConfig.from_dict(about["model"]), codec
