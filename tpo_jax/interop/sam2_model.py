"""Puts a published SAM 2 into a model folder."""

from __future__ import annotations

import dataclasses

from etils import epath

from tpo_jax.interop import folder
from tpo_jax.interop.sam2 import PREFIX, import_folder


def add_to_model(source: epath.PathLike, model: epath.PathLike, out: epath.PathLike) -> list[str]:
    """Writes a model folder with the network of `source` beside all that `model` has; training that
    starts from it and names the head sam2 has only the adapter to draw. Returns what was done.

    Raises:
      FamilyError, MappingError, ModelFolderError: name what does not fit.
    """
    config, leaves = import_folder(source)
    about = dataclasses.replace(folder.load_config(model), sam2=config)
    own = {
        name: leaf
        for name, leaf in folder.open_leaves(model).items()
        if not name.startswith(PREFIX)
    }
    folder.write_model(
        out, about.to_dict(), own | {PREFIX + name: leaf for name, leaf in leaves.items()},
        folder.load_codec(model), preprocessor=folder.preprocessor(about),
    )  # fmt: skip
    return [
        f"{out}: {model} and SAM 2 of {source}, {len(leaves)} parameters",
        'train with the head "sam2" and init_missing=["heads/sam2/adapter"]',
    ]
