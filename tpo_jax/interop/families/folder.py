"""Folders of published multimodal checkpoints, in and out, leaf by leaf.

An import keeps the published folder as it is: what goes back out takes its config.json, its other
files and its carried tensors from there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import ChatTemplate, TextCodec
from tpo_jax.interop import folder, huggingface
from tpo_jax.interop.chat_template import read_json
from tpo_jax.interop.families.base import Family, FamilyError
from tpo_jax.interop.families.registry import FAMILIES, family_of, from_leaves, to_leaves
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import tokens_of


def is_family(source: epath.PathLike) -> bool:
    """Whether a folder holds a multimodal checkpoint of a known family."""
    return family_of(read_json(epath.Path(source) / "config.json")) is not None


def option(text: str) -> tuple[str, Any]:
    """("mm_spatial_pool_stride", 2) of "mm_spatial_pool_stride=2"; values are JSON or text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: expected OPTION=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read_config(
    source: epath.PathLike, options: Mapping[str, Any]
) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Family, ModelConfig and config.json with `options` in it."""
    path = epath.Path(source)
    config = read_json(path / "config.json") | dict(options)
    family = family_of(config)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise FamilyError(f"{path / 'config.json'}: is of none of the families {known}")
    preprocessor = read_json(path / "preprocessor_config.json")
    return family, family.model_config(config, preprocessor), config


def import_family(
    source: epath.PathLike, out: epath.PathLike, options: Mapping[str, Any] | None = None
) -> list[str]:
    """Writes a model folder; returns what to tell about it.

    Args:
      options: entries of config.json that the published file lacks; "heads" are those to load.

    Raises:
      FamilyError, MappingError, HuggingFaceError, TensorFileError: name what does not fit.
    """
    path = epath.Path(source)
    family, config, data = read_config(path, options or {})
    tensors = huggingface.read_tensors(path)
    chosen = data.get("heads")
    chosen = [chosen] if isinstance(chosen, str) else chosen  # --set heads=region_mlp
    config = _headed(family, config, data, tensors, chosen)
    leaves, carried = to_leaves(family, config, tensors)
    if not (path / "tokenizer.json").exists():
        raise FamilyError(f"{path / 'tokenizer.json'}: missing; save the tokenizer as a fast one")
    sampling = family.sampling(data)
    template = dataclasses.replace(
        family.template, sampling=sampling.method, time_instruction=sampling.time_instruction
    )
    codec = fitted_codec(Tokenizer.from_str((path / "tokenizer.json").read_text()), template)
    if missing := set(tokens_of(config.heads)) - codec.task_tokens.keys():
        raise FamilyError(
            f"{path / 'tokenizer.json'}: has no {sorted(missing)}, which heads "
            f"{list(config.heads)} need; add them, or leave the heads out with --set heads=[]"
        )
    tokens = codec.task_tokens if config.heads else {}
    dtype = "bfloat16" if leaves["language/embed/table"].dtype.name == "bfloat16" else "float32"
    config = dataclasses.replace(
        config, tokens=tokens, visual_offset=codec.template.visual_offset, dtype=dtype
    )
    folder.write_model(
        out, config.to_dict(), leaves, codec, preprocessor=folder.preprocessor(config)
    )
    lines = [
        f"{out}: {family.name}, {len(leaves)} parameters",
        f"frames: {sampling.frames}, {sampling.method}; time instruction: "
        + ("yes" if sampling.time_instruction else "no"),
        f"heads: {', '.join(config.heads) or 'none'}",
    ]
    return lines + [f"  carried, not used: {name}" for name in sorted(carried)]


def export_family(
    model: epath.PathLike, out: epath.PathLike, like: epath.PathLike
) -> list[str]:
    """Writes a model in the layout of the published folder `like`; returns the names of files.

    Raises:
      FamilyError: the model has other sizes than `like`, or heads that have no place in it.
    """
    source, final = epath.Path(like), epath.Path(out)
    config = folder.load_config(model)
    family, published, data = read_config(source, {})
    parts = ("vision", "connector", "language")
    _same_sizes(model, config, like, published, parts)
    tensors = huggingface.read_tensors(source)
    published = _headed(family, published, data, tensors, config.heads)
    parts = ["box_encoder"] if config.heads else []
    sized = {"sam2": "sam2", "cg_detr": "head"}
    parts += [part for name, part in sized.items() if name in config.heads]
    _same_sizes(model, config, like, published, parts)
    _, carried = to_leaves(family, published, tensors)
    theirs = from_leaves(family, config, folder.open_leaves(model), carried, tensors.keys())
    for name in theirs.keys() & tensors.keys():
        if tuple(theirs[name].shape) != tuple(tensors[name].shape):
            raise FamilyError(f"{model}: {name} would be {list(theirs[name].shape)}, but in {like} "
                              f"it is {list(tensors[name].shape)}")  # fmt: skip
    temporary = final.with_name(final.name + ".tmp")
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)
    huggingface.write_tensors(temporary, theirs)
    for name, content in huggingface.side_files(source).items():
        (temporary / name).write_bytes(content)
    if final.exists():
        final.rmtree()
    temporary.rename(final)
    return sorted(file.name for file in final.iterdir())


def fitted_codec(tokenizer: Tokenizer, template: ChatTemplate) -> TextCodec:
    """The codec of a family's template; counts where the visual tokens start."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    count = 0
    for piece in re.split(r"(<[^<>\s]+>)", template.before_video):
        if piece in special:
            count += 1
        elif piece:
            count += len(tokenizer.encode(piece, add_special_tokens=False).ids)
    return TextCodec(tokenizer, dataclasses.replace(template, visual_offset=count))


def _headed(
    family: Family, config: ModelConfig, data: Mapping[str, Any], keys: Collection[str],
    chosen: Collection[str] | None,
) -> ModelConfig:
    """The configuration with the chosen heads of a checkpoint; None: those that read its input."""
    if family.with_heads is None:
        if chosen:
            raise FamilyError(f"heads {list(chosen)} have no place in {family.name}")
        return config
    return family.with_heads(config, keys, chosen, data)


def _same_sizes(
    model: epath.PathLike, config: ModelConfig, like: epath.PathLike, published: ModelConfig,
    parts: Sequence[str],
) -> None:
    for part in parts:
        ours, theirs = getattr(config, part), getattr(published, part)
        if _sizes(ours) != _sizes(theirs):
            raise FamilyError(f"{model}: {part} is {ours}, but {like} is {theirs}")


def _sizes(part: Any) -> Any:
    """What decides shapes and meaning; how it is run may differ."""
    running = ("remat", "unroll", "attention", "dropout", "max_frames")
    if not dataclasses.is_dataclass(part):
        return part
    return {k: v for k, v in dataclasses.asdict(part).items() if k not in running}
