"""A published multimodal folder as it was downloaded: configuration, tokenizer, parameters.

Nothing but headers is read here; `interop.folder` opens such a folder in the place of a model
folder, `families.folder` imports from it and exports to it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath
from tokenizers import Tokenizer

from tpo_jax.data.text import ChatTemplate, TextCodec
from tpo_jax.interop import huggingface, peft
from tpo_jax.interop.chat_template import (
    multimodal_template,
    read_json,
    read_processor_template,
    stop_tokens,
    template_ids,
)
from tpo_jax.interop.families import beside
from tpo_jax.interop.families.base import Family, FamilyError, Pixels, Sampling, said
from tpo_jax.interop.families.registry import FAMILIES, family_of, to_leaves
from tpo_jax.interop.mapping import Row
from tpo_jax.interop.tensors import LazyArray
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import tokens_of

ADAPTER = "adapter"  # folder beside the files of a family, in PEFT's layout
# Where `transformers` has said how images and videos become pixels: of both until 4.44; of videos
# from 4.45 and from 4.52; of both since version 5, by part.
VIDEO_FOLDER = "video_processor"
_PIXEL_FILES = (
    "preprocessor_config.json", f"{VIDEO_FOLDER}/preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_PROCESSOR, _PROCESSOR_PARTS = "processor_config.json", ("image_processor", "video_processor")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of a family; its weights are read on demand.

    Attributes:
      leaves: {parameter path: array}.
      rows: by which the tensors of the family's own files became leaves.
      carried: {their name: array} of what this program has no use for.
      unapplied: of the family, see there.
    """

    family: Family
    config: ModelConfig
    codec: TextCodec
    sampling: Sampling
    leaves: dict[str, LazyArray]
    rows: list[Row]
    carried: dict[str, LazyArray]
    unapplied: list[str]


def is_family(source: epath.PathLike) -> bool:
    """Whether a folder holds a multimodal checkpoint of a known family."""
    return family_of(read_json(epath.Path(source) / "config.json")) is not None


def open_source(
    source: epath.PathLike, options: Mapping[str, Any] | None = None, jinja: str | None = None
) -> Source:
    """Opens a folder; reads configuration, tokenizer and the headers of its tensors.

    Args:
      options: entries of config.json that the published file lacks; "heads" are those to load.
      jinja: text of a chat template that takes the place of the checkpoint's.

    Raises:
      AdapterError, FamilyError, MappingError, HuggingFaceError, TensorFileError: name what does not
        fit.
    """
    path = epath.Path(source)
    family, config, data = read_config(path, options or {})
    tensors = huggingface.read_tensors(path)
    chosen = data.get("heads")
    chosen = [chosen] if isinstance(chosen, str) else chosen  # --set heads=region_mlp
    others = beside.read(path)
    if others is not None and chosen is not None:
        raise FamilyError(f"heads: {chosen}: {path / beside.CONFIG} says which there are; leave "
                          "--set heads out")  # fmt: skip
    config = headed(family, config, data, tensors, [] if others else chosen)
    rows = family.rows(config, tensors.keys())
    leaves, carried = to_leaves(family, config, tensors)
    if (path / ADAPTER).exists():  # as `export --keep_adapters` leaves it
        modules = family.rows(config, peft.module_names(path / ADAPTER))
        leaves, lora = peft.with_kept(leaves, path / ADAPTER, modules)
        config = dataclasses.replace(config, lora=lora)
    if others is not None:
        config, leaves = others.joined(config), leaves | others.leaves
    codec = open_codec(path, options, jinja)
    if missing := set(tokens_of(config.heads)) - codec.task_tokens.keys():
        raise FamilyError(
            f"{path / 'tokenizer.json'}: has no {sorted(missing)}, which heads "
            f"{list(config.heads)} need; add them, or leave the heads out with --set heads=[]"
        )
    dtype = "bfloat16" if leaves["language/embed/table"].dtype.name == "bfloat16" else "float32"
    config = dataclasses.replace(
        config, tokens=codec.task_tokens if config.heads else {},
        visual_offset=codec.template.visual_offset, dtype=dtype,
    )  # fmt: skip
    unapplied = family.unapplied(data)
    return Source(family, config, codec, family.sampling(data), leaves, rows, carried, unapplied)


def open_codec(
    source: epath.PathLike, options: Mapping[str, Any] | None = None, jinja: str | None = None
) -> TextCodec:
    """Tokenizer of a folder and the texts around its videos, questions and answers."""
    path = epath.Path(source)
    data = read_json(path / "config.json") | dict(options or {})
    family = _family(path, data)
    tokenizer = huggingface.read_tokenizer(path)
    if jinja is None and family.reads_template:
        jinja = read_processor_template(path)
    if jinja is None and family.needs_template:
        raise FamilyError(
            f"{path}: has no chat template (chat_template.jinja, or chat_template.json), and a "
            "guess would change what the model reads around a video; put the published file there, "
            "or import with --chat_template=FILE.jinja"
        )
    template = family.template
    if jinja is None and family.conversation:
        said(data, "conv_template", (family.conversation,))
    if jinja is not None:
        template = multimodal_template(jinja, path, tokenizer, template)
    sampling = family.sampling(data)
    template = dataclasses.replace(
        template, sampling=sampling.method, frames=sampling.frames,
        time_instruction=sampling.time_instruction,
        stops=stop_tokens(path, tokenizer, template.end),
    )  # fmt: skip
    return fitted_codec(tokenizer, template)


def read_config(
    source: epath.PathLike, options: Mapping[str, Any]
) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """Family, ModelConfig and config.json with `options` in it.

    Raises:
      FamilyError: also for an option that the family does not read.
    """
    path = epath.Path(source)
    config = read_json(path / "config.json") | dict(options)
    family, entries = _family(path, config), _Entries(config)
    model = family.model_config(entries, read_pixels(path))
    if resize := entries.get("resize"):  # in no published file
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, resize=resize))
    _check_options(family, entries, options)
    return family, model, config


def read_pixels(directory: epath.PathLike) -> Pixels:
    """All that a folder says of how images and videos become pixels; {} where it says nothing."""
    path = epath.Path(directory)
    found = {name: read_json(path / name) for name in _PIXEL_FILES}
    parts = read_json(path / _PROCESSOR)
    found |= {f"{_PROCESSOR}: {part}": parts.get(part) for part in _PROCESSOR_PARTS}
    return {where: settings for where, settings in found.items() if settings}


class _Entries(collections.UserDict):
    """A config.json that keeps which of its entries were looked up."""

    def __init__(self, data: Mapping[str, Any]):
        self.read: set[str] = set()
        super().__init__(data)

    def __contains__(self, key: object) -> bool:
        self.read.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def _check_options(family: Family, entries: _Entries, options: Mapping[str, Any]) -> None:
    """Refuses options that nothing reads; those of ModelConfig have been looked up."""
    try:
        family.sampling(entries)
    except FamilyError:  # an import says so itself, for the others it does not matter
        return
    known = {"heads", *family.head_options} | entries.read
    known |= {"conv_template"} if family.conversation else set()
    if unknown := sorted(options.keys() - known):
        raise FamilyError(
            f"--set {unknown[0]} (train: config.init_options): nothing reads it in this "
            f"{family.name}; leave it out, or use one of {sorted(known)}"
        )


def headed(
    family: Family, config: ModelConfig, data: Mapping[str, Any], keys: Collection[str],
    chosen: Collection[str] | None,
) -> ModelConfig:  # fmt: skip
    """The configuration with the chosen heads of a checkpoint; None: those that read its input."""
    if family.with_heads is None:
        if chosen:
            raise FamilyError(f"heads {list(chosen)} have no place in {family.name}")
        return config
    return family.with_heads(config, keys, chosen, data)


def fitted_codec(tokenizer: Tokenizer, template: ChatTemplate) -> TextCodec:
    """The codec of a family's template; counts where the visual tokens start."""
    count = len(template_ids(template.before_video, tokenizer))
    return TextCodec(tokenizer, dataclasses.replace(template, visual_offset=count))


def _family(path: epath.Path, data: Mapping[str, Any]) -> Family:
    family = family_of(data)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise FamilyError(f"{path / 'config.json'}: is of none of the families {known}")
    return family
