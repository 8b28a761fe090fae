"""A SigLIP or SigLIP 2 folder of `transformers` as the eyes of a language folder.

Both are published apart from any language model, with a text half that is left out. What is written
is a model folder without a connector, which is where training starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from tpo_jax.interop import folder, huggingface, output, peft, precision
from tpo_jax.interop.chat_template import read_json
from tpo_jax.interop.export import read_about, write_about, write_language_model
from tpo_jax.interop.families import beside
from tpo_jax.interop.families.base import (
    BILINEAR,
    FamilyError,
    Pixels,
    assemble_parts,
    only,
    tower_config,
)
from tpo_jax.interop.families.source import read_pixels
from tpo_jax.interop.families.towers import tower_rows
from tpo_jax.interop.mapping import check_shapes, export_leaves, import_leaves
from tpo_jax.interop.tensors import read_file, write_file
from tpo_jax.models.published import SIGLIP2_CONNECTOR
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

PREFIX = "vision/"
CONNECTOR = "connector.safetensors"  # of an export: no published file holds it
KINDS = ("siglip", "siglip2")
# The text half, and the pooling head, whose output no language model here reads.
IGNORED = (r"text_model\..*", r"logit_(scale|bias)", r".*position_ids", r"vision_model\.head\..*")
# What enters the last layer is read, as in the LLaVA families.
LAYER = -2


def is_tower(source: epath.PathLike) -> bool:
    """Whether a folder holds SigLIP or SigLIP 2."""
    return read_json(epath.Path(source) / "config.json").get("model_type") in KINDS


def is_parts(source: epath.PathLike) -> bool:
    """Whether `export_parts` wrote a folder."""
    return (epath.Path(source) / CONNECTOR).exists()


def import_folder(path: epath.PathLike) -> tuple[TowerConfig, dict[str, Any]]:
    """The configuration and the leaves {"patch_embedding/kernel": array} of a folder with
    config.json and safetensors; leaves are read when they are asked for.

    Raises:
      FamilyError, MappingError: name what does not fit.
    """
    path = epath.Path(path)
    config = tower_of(read_json(path / "config.json"), read_pixels(path))
    rows = tower_rows(config, "", "vision_model.")
    return config, import_leaves(rows, huggingface.read_tensors(path), IGNORED)


def tower_of(data: Mapping[str, Any], pixels: Pixels) -> TowerConfig:
    """TowerConfig of config.json and what says how images become pixels."""
    vision = dict(data.get("vision_config") or {})
    vision["model_type"] = f"{data['model_type']}_vision_model"
    only(vision, "num_channels", 3)
    # SigLIP 2 resizes bilinearly; a connector that is new learns from bicubic pixels.
    pixels = {
        where: {option: value for option, value in settings.items()
                if (option, value) != ("resample", BILINEAR)}
        for where, settings in pixels.items()
    }  # fmt: skip
    return tower_config(vision, layer=LAYER, pixels=pixels)


def add_to_language(
    source: epath.PathLike, language: epath.PathLike, out: epath.PathLike
) -> list[str]:
    """Writes a model folder of the tower of `source` and a language folder; returns what was done.

    Raises:
      FamilyError, MappingError, ModelFolderError, OutputError: name what does not fit.
    """
    if not folder.holds_language_only(language):
        raise FamilyError(
            f"{language}: has eyes already; --into takes the language folder that `import` wrote"
        )
    tower, leaves = import_folder(source)
    config, dtype = folder.load_language(language)
    codec = folder.load_codec(language)
    about = dataclasses.replace(
        assemble_parts(tower, SIGLIP2_CONNECTOR, config), dtype=dtype,
        visual_offset=codec.template.visual_offset,
    )  # fmt: skip
    eyes = {PREFIX + name: leaf for name, leaf in leaves.items()}
    wanted = flatten(FunctionalModel(about).abstract())
    check_shapes(str(source), tower_rows(tower, PREFIX, "vision_model."), eyes,
                 {name: x.shape for name, x in wanted.items()})  # fmt: skip
    folder.write_model(
        out, about.to_dict(), dict(folder.open_leaves(language)) | eyes, codec,
        preprocessor=folder.preprocessor(about), reads=(source, language),
    )  # fmt: skip
    return [
        f"{out}: {language} and the {tower.kind} tower of {source}, {len(leaves)} parameters",
        'train with init_missing=["connector/"]',
    ]


def import_parts(source: epath.PathLike, out: epath.PathLike) -> list[str]:
    """Writes the model folder of what `export_parts` wrote; returns what was done.

    Raises:
      ExportFolderError, FamilyError, MappingError, OutputError, TensorFileError: name what does not
        fit.
    """
    path = epath.Path(source)
    config, codec = read_about(path)
    _, tower = import_folder(path / "vision")
    rows = huggingface.language_rows(config.language, config.language.vocab_size)
    leaves = import_leaves(rows, huggingface.read_tensors(path / "language_model"))
    leaves |= {PREFIX + name: leaf for name, leaf in tower.items()} | read_file(path / CONNECTOR)
    if (path / beside.TENSORS).exists():
        leaves |= beside.read_leaves(path, config.heads)
    folder.write_model(
        out, config.to_dict(), leaves, codec, preprocessor=folder.preprocessor(config),
        reads=(path,),
    )  # fmt: skip
    heads = ", ".join(config.heads) or "none"
    return [f"{out}: {config.vision.kind} and a language model, {len(leaves)} parameters, heads "
            f"{heads}"]  # fmt: skip


def export_parts(
    model: epath.PathLike, out: epath.PathLike, like: epath.PathLike,
    sam2_like: epath.PathLike | None = None, dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Writes a model of `add_to_language` as it came: `vision`, in the layout of the SigLIP folder
    `like` and with its text half, `language_model`, a Hugging Face folder, the connector and what
    the model is; heads beside them (families/beside.py). Adapters are merged. Returns what is in
    the folder, which appears whole or not at all.

    Args:
      sam2_like: folder of SAM 2 in whose layout the network of the head sam2 goes out.
      dtype: of the language model and the tower, one of `precision.DTYPES`; None: as they are.

    Raises:
      FamilyError: the model has other eyes than `like`, or another SAM 2 than `sam2_like`.
      OutputError: `out` holds something else.
    """
    source = epath.Path(like)
    config, codec = folder.load_config(model), folder.load_codec(model)
    tower, _ = import_folder(source)
    running = {name: getattr(tower, name) for name in ("remat", "unroll", "max_frames")}
    if config.vision.kind != tower.kind or dataclasses.replace(config.vision, **running) != tower:
        raise FamilyError(f"{model}: vision is {config.vision}, but {like} is {tower}")
    beside.check_sam2(model, config, like, sam2_like)
    leaves = folder.open_leaves(model)
    leaves = peft.merged_leaves(leaves, config.lora) if config.lora else leaves
    leaves, others = beside.split(config, leaves)
    parts = {
        name: {path: leaf for path, leaf in leaves.items() if path.startswith(f"{name}/")}
        for name in ("vision", "connector", "language")
    }
    with output.replacing(out, output.EXPORT, model, like, sam2_like) as temporary:
        if others:
            beside.write(temporary, config, others, sam2_like)
        vision = temporary / "vision"
        vision.mkdir()
        published = huggingface.read_tensors(source)
        tensors = export_leaves(tower_rows(tower, PREFIX, "vision_model."), parts["vision"])
        tensors = precision.cast(published | tensors, dtype)
        huggingface.write_tensors(vision, tensors)
        for name, content in huggingface.side_files(source).items():
            (vision / name).write_bytes(content)
        huggingface.keep_dtype(vision / "config.json", tensors, published, dtype is not None)
        inner = temporary / "language_model"
        write_language_model(inner, config.language, parts["language"], codec, dtype)
        write_file(temporary / CONNECTOR, parts["connector"], output.EXPORT_METADATA)
        write_about(temporary, dataclasses.replace(config, lora=None), codec)
    return sorted(file.name for file in epath.Path(out).iterdir())
