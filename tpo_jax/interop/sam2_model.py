"""Puts a published SAM 2 into a model folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tpo_jax.interop import folder
from tpo_jax.interop.sam2 import NAME, PREFIX, import_network
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import head
from tpo_jax.models.heads.base import FRAME_TOKENS

# What the head needs beside the network; a model that has had no such head lacks some of it.
_NEEDED = (
    f"heads/{NAME}/adapter", f"heads/{NAME}/box_readout", f"task_tokens/{head(NAME).task}",
    "box_encoder",
)  # fmt: skip


def add_to_model(source: epath.PathLike, model: epath.PathLike, out: epath.PathLike) -> list[str]:
    """Writes a model folder with the network of `source` beside all that `model` has, but for
    another head of its task: one answers a task. Training that starts from it and names the head
    sam2 has what the last line says to draw, the memory too where `source` is a folder of
    `Sam2Model`. Returns what was done.

    Raises:
      FamilyError, MappingError, ModelFolderError, OutputError: name what does not fit.
    """
    config, leaves, unread = import_network(source)
    before = folder.load_config(model)
    others = tuple(h for h in before.heads if h != NAME and head(h).task == head(NAME).task)
    kept = tuple(h for h in before.heads if h not in others)
    about = dataclasses.replace(before, heads=kept, sam2=config)
    gone = _prefixes_without(before, others, kept)
    own = {
        name: leaf
        for name, leaf in folder.open_leaves(model).items()
        if not name.startswith((PREFIX, *gone))
    }
    new = {PREFIX + name: leaf for name, leaf in leaves.items()}
    folder.write_model(
        out, about.to_dict(), own | new, folder.load_codec(model),
        preprocessor=folder.preprocessor(about), reads=(source, model),
    )  # fmt: skip
    return [
        f"{out}: {model} and SAM 2 of {source}, {len(leaves)} parameters",
        *(f"  left out: head {name}, whose task {NAME} answers" for name in others),
        *_without_memory(source, unread),
        _how_to_train(kept, own, unread),
    ]


def _prefixes_without(
    config: ModelConfig, others: tuple[str, ...], kept: tuple[str, ...]
) -> list[str]:
    """Where the parameters lie that only the heads `others` read."""
    gone = [f"heads/{name}/" for name in others]
    shared = any(head(name).reads_tokens for name in config.heads)
    if shared and not any(head(name).reads_tokens for name in kept):
        gone.append(f"heads/{FRAME_TOKENS}/")
    return gone


def _without_memory(source: epath.PathLike, unread: Sequence[str]) -> list[str]:
    """What to know of a network whose parts `unread` were not in the folder."""
    if not unread:
        return []
    return [
        f"  not there: {', '.join(unread)}: {source} is of `Sam2Model` and has no memory",
        "  so this model cannot track: drawn anew, the memory says nothing until it is trained; "
        f"let trainable name these parts of {PREFIX}, or import a folder of `Sam2VideoModel`",
    ]


def _how_to_train(kept: tuple[str, ...], own: Mapping[str, Any], unread: Sequence[str]) -> str:
    """The options of a config that starts from the folder."""
    heads = [*kept, *[NAME] * (NAME not in kept)]
    missing = [name for name in _NEEDED if not any(path.startswith(name) for path in own)]
    missing += [PREFIX + part for part in unread]
    lacks = f" and init_missing={json.dumps(missing)}" if missing else ""
    return f'train with model.preset="", model.heads={json.dumps(heads)}{lacks}'
