"""The model folder: everything that a trained model is, in published formats.

    config.json                       ModelConfig with its format version; written last
    model-00001-of-0000n.safetensors  parameters, keyed by path ("language/embed/table")
    tokenizer.json, template.json     data.text.TextCodec
    preprocessor.json                 how frames become input, for programs that are not this one

A folder appears whole or not at all: it is written beside its final name and renamed.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from tpo_jax.data.text import TextCodec
from tpo_jax.models.config import ModelConfig
from tpo_jax.parallel.paths import flatten, unflatten

SHARD_BYTES = 15 * 2**20
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# The tables with one row (embed) or one column (lm_head) per token of the vocabulary.
_TOKEN_AXIS = {"language/embed/table": 0, "language/lm_head/kernel": 1}


class ModelFolderError(ValueError):
    """A model folder that is incomplete or does not fit; the message names file, leaf and fix."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters read from a folder.

    Attributes:
      leaves: {path: array} of every parameter that the folder has.
      missing: paths that it lacks and `init_missing` allows; the caller initialises them.
    """

    leaves: dict[str, jax.Array | np.ndarray]
    missing: tuple[str, ...]


def save_model(
    directory: epath.PathLike, model_config: ModelConfig, params: Any, codec: TextCodec
) -> None:
    """Writes a model folder, replacing one that is there.

    With several processes every one calls this (leaves that no process holds whole are gathered
    one at a time); process 0 writes.

    Args:
      params: nested dict of jax.Array or numpy arrays.
    """
    final = epath.Path(directory)
    temporary = final.with_name(final.name + ".tmp")
    leaves = flatten(params)
    shards = _assign_shards(leaves)
    writes = jax.process_index() == 0
    if writes:
        if temporary.exists():
            temporary.rmtree()
        temporary.mkdir(parents=True)
    for index, paths in enumerate(shards, start=1):
        tensors = {path: _to_host(leaves[path]) for path in paths}
        if writes:
            name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            data = safetensors.numpy.save(tensors, metadata={"format": "tpo_jax"})
            (temporary / name).write_bytes(data)
    if writes:
        codec.save(temporary)
        _write_json(temporary / "preprocessor.json", preprocessor(model_config))
        _write_json(temporary / "config.json", model_config.to_dict())
        _replace(temporary, final)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_model:{final}")


def preprocessor(model_config: ModelConfig) -> dict[str, Any]:
    """How frames become input: uint8 RGB, resized to image_size, then (x / 255 - mean) / std."""
    vision = model_config.vision
    return {
        "format_version": 1,
        "image_size": vision.image_size,
        "max_frames": vision.max_frames,
        "rescale_factor": 1 / 255,
        "image_mean": list(getattr(vision, "mean", (0.5, 0.5, 0.5))),
        "image_std": list(getattr(vision, "std", (0.5, 0.5, 0.5))),
    }


def load_model(directory: epath.PathLike) -> tuple[ModelConfig, dict[str, Any], TextCodec]:
    """Reads a model folder: (config, nested dict of numpy arrays, codec).

    Raises:
      ModelFolderError: not a complete model folder.
    """
    path = epath.Path(directory)
    model_config = load_config(path)
    leaves = {name: tensor for name, tensor in _read_tensors(path)}
    return model_config, unflatten(leaves), TextCodec.load(path)


def load_config(directory: epath.PathLike) -> ModelConfig:
    """The ModelConfig of a model folder."""
    path = epath.Path(directory) / "config.json"
    if not path.exists():
        raise ModelFolderError(
            f"{path}: missing, so {directory} is not a complete model folder; "
            "give the folder that training wrote (workdir/model)"
        )
    return ModelConfig.from_dict(json.loads(path.read_text()))


def load_into(
    abstract: Any,
    directory: epath.PathLike,
    *,
    init_missing: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
) -> Loaded:
    """Reads parameters by name into the shapes, dtypes and shardings asked for.

    Args:
      abstract: nested dict of jax.ShapeDtypeStruct; leaves with a sharding are placed by it, the
        others stay numpy. Floating leaves are cast to the dtype asked for.
      init_missing: regexes (anchored at the start of a path) of parameters that the folder may
        lack. Each must match at least one parameter.
      new_tokens: ids that the folder's model did not know (task tokens of added heads). Their
        rows in the token tables become the mean of the rows that were in use: an untrained row
        is noise, the mean is a neutral start.

    Raises:
      ModelFolderError: lists every parameter that is missing, extra, or of another shape.
    """
    path = epath.Path(directory)
    wanted = flatten(abstract)
    have = _read_shapes(path)
    missing = _check_names(path, wanted, have, init_missing)
    used_tokens = _used_tokens(path, new_tokens) if new_tokens else 0
    leaves: dict[str, jax.Array | np.ndarray] = {}
    for name, tensor in _read_tensors(path):
        if new_tokens and name in _TOKEN_AXIS:
            tensor = _fill_new_tokens(tensor, _TOKEN_AXIS[name], used_tokens, new_tokens)
        leaves[name] = _place(tensor, wanted[name])
    return Loaded({name: leaves[name] for name in wanted if name in leaves}, missing)


def added_tokens(old: ModelConfig, new: ModelConfig) -> tuple[int, ...]:
    """Ids of the task tokens that `new` has and `old` lacks.

    Raises:
      ModelFolderError: a token of both has two ids.
    """
    for token in old.tokens.keys() & new.tokens.keys():
        if old.tokens[token] != new.tokens[token]:
            raise ModelFolderError(
                f"token {token}: id {old.tokens[token]} in the model folder, {new.tokens[token]} "
                "here; take the tokenizer from the folder (tokenizer='')"
            )
    return tuple(sorted(new.tokens[token] for token in new.tokens.keys() - old.tokens.keys()))


def _assign_shards(leaves: Mapping[str, Any]) -> list[list[str]]:
    """Paths by shard: in order, a new shard where the next leaf would pass SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    filled = 0
    for path, leaf in leaves.items():
        size = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        # The header takes some bytes per tensor; 256 is more than a path and its numbers.
        if shards[-1] and filled + size + 256 > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(path)
        filled += size + 256
    return shards


def _to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, order="C")


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _replace(temporary: epath.Path, final: epath.Path) -> None:
    """Puts `temporary` in the place of `final`; the old folder is removed last."""
    old = final.with_name(final.name + ".old")
    if old.exists():
        old.rmtree()
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    if old.exists():
        old.rmtree()


def _shard_files(path: epath.Path) -> list[epath.Path]:
    """The shards in order.

    Raises:
      ModelFolderError: none, or some of "model-i-of-n" are not there.
    """
    files = sorted(path.glob("model-*-of-*.safetensors"), key=lambda file: file.name)
    counts = {int(re.search(r"-of-(\d+)", file.name)[1]) for file in files}
    if not files or counts != {len(files)}:
        raise ModelFolderError(
            f"{path}: holds {len(files)} parameter shards of "
            f"{' or '.join(map(str, sorted(counts))) or 'an unknown number'}; copy the folder again"
        )
    return files


def _read_tensors(path: epath.Path) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every parameter, one shard in memory at a time."""
    for file in _shard_files(path):
        try:
            entries = safetensors.deserialize(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise ModelFolderError(
                f"{file}: not a safetensors file ({error}); copy it again"
            ) from error
        for name, entry in entries:
            array = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]])
            yield name, array.reshape(entry["shape"])


def _read_shapes(path: epath.Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} from the headers (8 bytes of length, then JSON) alone."""
    shapes = {}
    for file in _shard_files(path):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(length))
            except (ValueError, OverflowError, MemoryError) as error:
                raise ModelFolderError(
                    f"{file}: not a safetensors file ({error}); copy it again"
                ) from error
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


def _check_names(
    path: epath.Path,
    wanted: Mapping[str, Any],
    have: Mapping[str, tuple[int, ...]],
    init_missing: Sequence[str],
) -> tuple[str, ...]:
    """Paths to initialise; raises with every leaf that is missing, extra or mis-shaped."""
    unused = [regex for regex in init_missing if not _matching([regex], wanted)]
    if unused:
        raise ModelFolderError(
            f"init_missing: {unused[0]!r} matches no parameter of this model; remove it or see "
            "the paths in the parameter table"
        )
    allowed = set(_matching(init_missing, wanted))
    lines = [
        f"  {name}: not in the folder; list it in init_missing to initialise it"
        for name in wanted
        if name not in have and name not in allowed
    ]
    lines += [
        f"  {name}: in the folder only; this model would drop it (see model.heads)"
        for name in have
        if name not in wanted
    ]
    lines += [
        f"  {name}: folder has {list(have[name])}, this model {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in have and have[name] != tuple(leaf.shape)
    ]
    if lines:
        raise ModelFolderError(
            f"{path}: the parameters do not fit this model ({len(lines)} leaves):\n"
            + "\n".join(lines)
        )
    return tuple(name for name in wanted if name not in have)


def _matching(regexes: Iterable[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(re.match(regex, name) for regex in regexes)]


def _used_tokens(path: epath.Path, new_tokens: Sequence[int]) -> int:
    """Vocabulary size of the folder's own tokenizer."""
    used = TextCodec.load(path).vocab_size
    if min(new_tokens) < used:
        raise ModelFolderError(
            f"{path}: token id {min(new_tokens)} is new to this model, but the folder's tokenizer "
            f"uses ids 0..{used - 1}; build the tokenizer from the folder's (tokenizer='')"
        )
    return used


def _fill_new_tokens(
    table: np.ndarray, axis: int, used: int, new_tokens: Sequence[int]
) -> np.ndarray:
    """The table with the rows of `new_tokens` set to the mean of rows [0, used), in float32."""
    rows = np.moveaxis(table, axis, 0).copy()
    rows[list(new_tokens)] = rows[:used].astype(np.float32).mean(axis=0).astype(rows.dtype)
    return np.moveaxis(rows, 0, axis)


def _place(tensor: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
    tensor = tensor.astype(wanted.dtype)
    if wanted.sharding is None:
        return tensor
    return jax.make_array_from_callback(
        tensor.shape, wanted.sharding, lambda index: tensor[index]
    )
