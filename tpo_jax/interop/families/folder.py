"""Folders of published multimodal checkpoints, in and out, leaf by leaf.

An import keeps the published folder as it is: what goes back out takes its config.json, its other
files and its carried tensors from there. Heads that have no place in its layout are in beside.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import TextCodec
from tpo_jax.interop import folder, huggingface, output, peft, precision
from tpo_jax.interop.families import beside
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.registry import from_leaves, to_leaves
from tpo_jax.interop.families.source import (
    ADAPTER,
    VIDEO_FOLDER,
    Source,
    headed,
    open_source,
    read_config,
)
from tpo_jax.interop.mapping import check_shapes
from tpo_jax.interop.tensors import LazyArray
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

# Modules have the names of `transformers` 5 in memory, on disk those of version 4.
IN_MEMORY = ("model.",)
# What to do about a part of another size, where the layout has a place for one size alone.
_FIXES = {"sam2": "; put a SAM 2 of that size into the model, with import --into"}


def option(text: str) -> tuple[str, Any]:
    """("mm_spatial_pool_stride", 2) of "mm_spatial_pool_stride=2"; values are JSON or text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: expected OPTION=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def import_family(
    source: epath.PathLike,
    out: epath.PathLike,
    options: Mapping[str, Any] | None = None,
    adapter: epath.PathLike | None = None,
    jinja: str | None = None,
    keep_adapters: bool = False,
) -> list[str]:
    """Writes a model folder; returns what to tell about it.

    Adapters that lie beside the source, as `export_family` keeps them apart, become leaves.

    Args:
      options: entries of config.json that the published file lacks; "heads" are those to load.
      adapter: PEFT folder to merge into the model, also one that lies beside the source.
      jinja: text of a chat template that takes the place of the checkpoint's.
      keep_adapters: `adapter` becomes leaves instead.

    Raises:
      AdapterError, FamilyError, MappingError, HuggingFaceError, OutputError, TensorFileError: name
        what does not fit.
    """
    opened = open_source(source, options, jinja)
    config, leaves = opened.config, opened.leaves
    if adapter is not None and epath.Path(adapter) != epath.Path(source) / ADAPTER:
        config, leaves = _with_adapter(opened, adapter)
    if adapter is not None and config.lora is not None and not keep_adapters:
        leaves = peft.merged_leaves(leaves, config.lora)
        config = dataclasses.replace(config, lora=None)
    wanted = flatten(FunctionalModel(config).abstract())
    check_shapes(str(source), opened.rows, leaves, {name: x.shape for name, x in wanted.items()})
    folder.write_model(
        out, config.to_dict(), leaves, opened.codec, preprocessor=folder.preprocessor(config),
        reads=(source, adapter),
    )  # fmt: skip
    sampling, template = opened.sampling, opened.codec.template
    lines = [
        f"{out}: {opened.family.name}, {len(leaves)} parameters",
        f"frames: {sampling.frames}, {sampling.method}; time instruction: "
        + ("yes" if sampling.time_instruction else "no"),
        f"template: {template.before_video!r}, video, question",
        f"an answer stops at: {', '.join((template.end, *template.stops))}",
        f"heads: {', '.join(config.heads) or 'none'}",
        f"adapters: {_adapters(config)}",
    ]
    lines += [f"  not applied in training: {entry}" for entry in opened.unapplied]
    return lines + [f"  carried, not used: {name}" for name in sorted(opened.carried)]


def _adapters(config: ModelConfig) -> str:
    lora = config.lora
    return f"rank {lora.rank}, alpha {lora.alpha:g}" if lora else "none"


def _with_adapter(
    opened: Source, adapter: epath.PathLike
) -> tuple[ModelConfig, dict[str, LazyArray]]:
    """A checkpoint without adapters with those of a PEFT folder."""
    rows = opened.family.rows(beside.in_layout(opened.config), peft.module_names(adapter))
    leaves, lora = peft.with_kept(opened.leaves, adapter, rows)
    return dataclasses.replace(opened.config, lora=lora), leaves


def export_family(
    model: epath.PathLike, out: epath.PathLike, like: epath.PathLike,
    options: Mapping[str, Any] | None = None, keep_adapters: bool = False,
    sam2_like: epath.PathLike | None = None, dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Writes a model in the layout of the published folder `like`; returns the names of files.

    LoRA adapters are merged into their kernels, or written beside the model in PEFT's layout;
    where the published model has adapters itself (VideoChat), they go back to their place in it.
    The tokenizer is the model's, which has the tokens of its heads.

    Args:
      options: entries of config.json that `like` lacks, as they were given to the import.
      keep_adapters: do not merge.
      sam2_like: folder of SAM 2 in whose layout the network of the head sam2 goes out.
      dtype: of what is not carried (`precision.cast`).

    Raises:
      AdapterError, FamilyError, MappingError: the model has other sizes than `like`, or parts that
        have no place in it.
      OutputError: `out` holds something else.
    """
    source = epath.Path(like)
    config, leaves = folder.load_config(model), folder.open_leaves(model)
    family, published, data = read_config(source, options or {})
    beside.check_sam2(model, config, like, sam2_like)
    _same_sizes(model, config, like, published, ["vision", "connector", "language"])
    tensors = huggingface.read_tensors(source)
    layout, lora, with_adapters = beside.in_layout(config), config.lora, leaves
    published = headed(family, published, data, tensors, layout.heads)
    apart = lora is not None and published.lora is None  # its layout has no place for adapters
    if apart:
        layout = dataclasses.replace(layout, lora=None)
        leaves = (peft.without_adapters(leaves) if keep_adapters
                  else peft.merged_leaves(leaves, lora))  # fmt: skip
    _same_sizes(model, layout, like, published, _further_parts(layout, published))
    own, others = beside.split(config, leaves)
    _, carried = to_leaves(family, published, tensors)
    theirs = from_leaves(family, layout, own, {}, tensors.keys())
    _same_shapes(model, theirs, like, tensors)
    theirs = precision.cast(theirs, dtype, tensors)
    with output.replacing(out, output.EXPORT, model, like, sam2_like) as temporary:
        if others:
            beside.write(temporary, config, others, sam2_like)
        if apart and keep_adapters:
            rows = family.rows(layout, IN_MEMORY)
            peft.write_adapter(temporary / ADAPTER, with_adapters, lora, rows, whole_names=True)
        huggingface.write_tensors(temporary, theirs | carried)
        _write_side_files(temporary, source, folder.load_codec(model))
        huggingface.keep_dtype(temporary / "config.json", theirs, tensors, dtype is not None)
    return sorted(file.name for file in epath.Path(out).iterdir())


def _write_side_files(out: epath.Path, source: epath.Path, codec: TextCodec) -> None:
    """The small files of the published folder; the model's tokenizer where it has other tokens."""
    for name, content in huggingface.side_files(source).items():
        if name != beside.CONFIG:  # of another model that went out
            (out / name).write_bytes(content)
    if (source / VIDEO_FOLDER).is_dir():
        (out / VIDEO_FOLDER).mkdir()
        for name, content in huggingface.side_files(source / VIDEO_FOLDER).items():
            (out / VIDEO_FOLDER / name).write_bytes(content)
    file, tokenizer = out / "tokenizer.json", codec.tokenizer
    if Tokenizer.from_str(file.read_text()).get_vocab() != tokenizer.get_vocab():
        file.write_text(tokenizer.to_str(pretty=True))


def _further_parts(config: ModelConfig, published: ModelConfig) -> list[str]:
    """What the heads of a model and the adapters of a published one make part of its layout."""
    sized = {"sam2": "sam2", "cg_detr": "head"}
    parts = [part for name, part in sized.items() if name in config.heads]
    return parts + ["lora"] * (published.lora is not None)  # its adapters go where theirs are


def _same_shapes(
    model: epath.PathLike, ours: Mapping[str, Any], like: epath.PathLike, theirs: Mapping[str, Any]
) -> None:
    for name in ours.keys() & theirs.keys():
        if tuple(ours[name].shape) != tuple(theirs[name].shape):
            raise FamilyError(f"{model}: {name} would be {list(ours[name].shape)}, but in {like} "
                              f"it is {list(theirs[name].shape)}")  # fmt: skip


def _same_sizes(
    model: epath.PathLike, config: ModelConfig, like: epath.PathLike, published: ModelConfig,
    parts: Sequence[str],
) -> None:  # fmt: skip
    for part in parts:
        ours, theirs = getattr(config, part), getattr(published, part)
        if _sizes(ours) != _sizes(theirs):
            fix = _FIXES.get(part, "")
            raise FamilyError(f"{model}: {part} is {ours}, but {like} is {theirs}{fix}")


def _sizes(part: Any) -> Any:
    """What decides shapes and meaning; how it is run may differ."""
    running = ("remat", "unroll", "attention", "dropout", "max_frames")
    if not dataclasses.is_dataclass(part):
        return part
    return {k: v for k, v in dataclasses.asdict(part).items() if k not in running}
