"""What a model of a family has that the family's layout has no place for.

    tpo.safetensors   task tokens, box encoder and heads, named by parameter path
    tpo_config.json   what the family's config.json does not say of the model
    sam2/             network of the head sam2, a folder that `Sam2VideoModel` loads

These lie in the published folder, beside the files of the family. VideoChat-TPO is published with
heads: those that came from it have their place in its layout. All others lie beside, also those
that were trained on a VideoChat model without heads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from tpo_jax.interop import huggingface, sam2
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.tensors import LazyArray, read_file, write_file
from tpo_jax.models.config import ModelConfig

TENSORS, CONFIG, SAM2 = "tpo.safetensors", "tpo_config.json", "sam2"
FORMAT_VERSION = 1
# Of ModelConfig; a family's config.json says the rest.
_FIELDS = ("heads", "head", "sam2", "box_encoder", "clip_features", "text_features")
_OF_FAMILY = ("vision/", "connector/", "language/")


@dataclasses.dataclass(frozen=True)
class Beside:
    """about: fields of ModelConfig. leaves: {parameter path: array}, read on demand."""

    about: Mapping[str, Any]
    leaves: dict[str, LazyArray]

    def joined(self, config: ModelConfig) -> ModelConfig:
        """The whole model's, without the ids of its tokens; `config` is of the family's files."""
        return ModelConfig.from_dict(config.to_dict() | self.about)


def in_layout(config: ModelConfig) -> ModelConfig:
    """The model as its family's layout has it. Heads that came from the layout of VideoChat-TPO
    are known by the box encoder that came with them."""
    return config if config.box_encoder == "tpo" else dataclasses.replace(config, heads=())


def split(
    config: ModelConfig, leaves: Mapping[str, LazyArray]
) -> tuple[dict[str, LazyArray], dict[str, LazyArray]]:
    """(leaves with a place in the layout, the others)."""
    if in_layout(config).heads:
        return dict(leaves), {}
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(_OF_FAMILY)}
    return own, {path: leaf for path, leaf in leaves.items() if path not in own}


def check_sam2(
    model: epath.PathLike, config: ModelConfig, like: epath.PathLike,
    sam2_like: epath.PathLike | None,
) -> None:  # fmt: skip
    """Refuses a SAM 2 without a layout to go out in, and a layout without a SAM 2."""
    heads, placed = list(config.heads), in_layout(config).heads
    if sam2_like is None and sam2.NAME in heads and not placed:
        raise FamilyError(
            f"{model}: model.heads: {heads}: the layout of {like} has no place for the network of "
            f"{sam2.NAME}; give the folder of SAM 2 that it came from with a second --like"
        )
    if sam2_like is not None and (placed or sam2.NAME not in heads):
        why = f"which have their place in {like}" if placed else f"without {sam2.NAME}"
        raise FamilyError(
            f"{model}: model.heads: {heads}, {why}, so nothing goes out as {sam2_like}; leave that "
            "--like out"
        )


def write(
    out: epath.Path, config: ModelConfig, leaves: Mapping[str, LazyArray],
    sam2_like: epath.PathLike | None,
) -> None:  # fmt: skip
    """Writes the leaves of a model that its family has no place for.

    Raises:
      FamilyError: the folder of SAM 2 `sam2_like` is of another size than the model's network.
    """
    if sam2_like is not None:
        leaves = sam2.split_network(out / SAM2, config.sam2, leaves, sam2_like)
    write_file(out / TENSORS, leaves, {"format": "pt"})
    about = config.to_dict()
    about = {name: about[name] for name in _FIELDS if name in about}
    huggingface.write_json(out / CONFIG, {"format_version": FORMAT_VERSION, "model": about})


def read(source: epath.PathLike) -> Beside | None:
    """What lies beside the files of a family; None where a folder has nothing of it.

    Raises:
      FamilyError: one of the files is missing, or was written by another version.
    """
    path = epath.Path(source)
    missing = [name for name in (CONFIG, TENSORS) if not (path / name).exists()]
    if len(missing) == 2:
        return None
    if missing:
        raise FamilyError(f"{path / missing[0]}: missing; copy the folder again")
    about = read_about(path / CONFIG)["model"]
    if unknown := sorted(about.keys() - set(_FIELDS)):
        raise FamilyError(
            f"{path / CONFIG}: model: {unknown}: belong to config.json of a family, beside which "
            f"it says {list(_FIELDS)}; export the model again"
        )
    return Beside(about, read_leaves(path, about["heads"]))


def read_leaves(path: epath.Path, heads: Collection[str]) -> dict[str, LazyArray]:
    """Leaves of tpo.safetensors, and the network of SAM 2 where it is one of the heads."""
    leaves = read_file(path / TENSORS)
    if sam2.NAME in heads:
        _, network = sam2.import_folder(path / SAM2)
        leaves |= {sam2.PREFIX + name: leaf for name, leaf in network.items()}
    return leaves


def read_about(file: epath.Path) -> dict[str, Any]:
    """tpo_config.json; FamilyError where another version wrote it."""
    about = json.loads(file.read_text())
    if about["format_version"] != FORMAT_VERSION:
        raise FamilyError(
            f"{file}: format_version {about['format_version']}, this program reads "
            f"{FORMAT_VERSION}; export the model again"
        )
    return about
