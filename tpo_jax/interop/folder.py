"""The model folder: everything that a trained model is, in published formats.

    config.json                       ModelConfig with its format version; written last
    model-00001-of-0000n.safetensors  parameters, keyed by path ("language/embed/table")
    tokenizer.json, template.json     data.text.TextCodec
    preprocessor.json                 how frames become input, for programs that are not this one

A language folder is one without eyes: its config.json has "language" and "dtype" alone, all of its
parameters are below "language/", and huggingface/ keeps the small files that it was imported with.
It is a start for training (with a preset for the rest), not a model that answers about videos. A
Hugging Face folder of such a model serves as one as it is, and the published folder of a multimodal
family (families/) serves as a whole model folder.

A folder appears whole or not at all: it is written beside its final name and renamed.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tpo_jax.data.text import TextCodec
from tpo_jax.errors import UserError
from tpo_jax.interop import huggingface, output
from tpo_jax.interop.families import source
from tpo_jax.interop.tensors import (
    Box,
    Index,
    LazyArray,
    TensorFileError,
    assign_shards,
    lazy,
    mean,
    read_file,
    read_parts,
    resized,
    shard_name,
    transposed,
    write_file,
)
from tpo_jax.models.config import FORMAT_VERSION, LanguageConfig, ModelConfig
from tpo_jax.parallel.paths import flatten, unflatten

# What the config.json of a family's published folder lacks, see `source.open_source`; other folders
# lack nothing.
Options = Mapping[str, Any] | None

SHARD_BYTES = 15 * 2**20
SIDE_FILES = "huggingface"
_LANGUAGE_KEYS = {"format_version", "language", "dtype"}
# Options of LanguageConfig that say how it runs, not what it computes.
_RUNNING = ("dropout", "unroll")
# Those that a run chooses; what older folders say of them is left.
_CHOSEN_BY_RUNS = ("remat", "attention")
# The tables with one row (embed) or one column (lm_head) per token of the vocabulary.
_TOKEN_AXIS = {"language/embed/table": 0, "language/lm_head/kernel": 1}


class ModelFolderError(UserError):
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
    """Writes a model folder, replacing one that is there, and nothing else.

    With several processes every one calls this (leaves that no process holds whole are gathered
    one at a time); process 0 writes.

    Args:
      params: nested dict of jax.Array or numpy arrays.

    Raises:
      OutputError: something else is there.
    """
    leaves = flatten(params)
    writes = jax.process_index() == 0
    shards = assign_shards(leaves, SHARD_BYTES)
    place = output.replacing(directory, output.MODEL) if writes else contextlib.nullcontext()
    with place as temporary:
        for index, paths in enumerate(shards, start=1):
            tensors = {path: lazy(_to_host(leaves[path])) for path in paths}
            if writes:
                _write_shard(temporary, index, len(shards), tensors)
        if writes:
            codec.save(temporary)
            _write_json(temporary / "preprocessor.json", preprocessor(model_config))
            _write_json(temporary / "config.json", model_config.to_dict())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_model:{directory}")


def write_model(
    directory: epath.PathLike,
    config: Mapping[str, Any],
    leaves: Mapping[str, LazyArray],
    codec: TextCodec,
    side_files: Mapping[str, bytes] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    reads: Sequence[epath.PathLike | None] = (),
) -> None:
    """Writes a folder leaf by leaf from a source that is read on demand; one process.

    Args:
      config: what config.json holds.
      side_files: files to keep below huggingface/.
      reads: folders that the leaves are read from.

    Raises:
      OutputError: something else is there, or a folder that is read.
    """
    shards = assign_shards(leaves, SHARD_BYTES)
    with output.replacing(directory, output.MODEL, *reads) as temporary:
        for index, paths in enumerate(shards, start=1):
            _write_shard(temporary, index, len(shards), {path: leaves[path] for path in paths})
        codec.save(temporary)
        if side_files:
            (temporary / SIDE_FILES).mkdir()
            for name, data in side_files.items():
                (temporary / SIDE_FILES / name).write_bytes(data)
        if preprocessor:
            _write_json(temporary / "preprocessor.json", preprocessor)
        _write_json(temporary / "config.json", config)


def _write_shard(
    folder: epath.Path, index: int, count: int, tensors: Mapping[str, LazyArray]
) -> None:
    write_file(folder / shard_name(index, count), tensors, output.MODEL_METADATA)


def preprocessor(model_config: ModelConfig) -> dict[str, Any]:
    """How frames become input: uint8 RGB, resized to image_size, then (x / 255 - mean) / std."""
    vision = model_config.vision
    return {
        "format_version": 1,
        "image_size": vision.image_size,
        "max_frames": vision.max_frames,
        "rescale_factor": 1 / 255,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def load_model(
    directory: epath.PathLike, options: Options = None
) -> tuple[ModelConfig, dict[str, Any], TextCodec]:
    """Reads a model folder: (config, nested dict of numpy arrays, codec).

    Raises:
      ModelFolderError: not a complete model folder.
    """
    model_config = load_config(directory, options=options)
    leaves = {name: np.asarray(leaf) for name, leaf in open_leaves(directory, options).items()}
    return model_config, unflatten(leaves), load_codec(directory, options)


def load_config(
    directory: epath.PathLike, base: ModelConfig | None = None, options: Options = None
) -> ModelConfig:
    """The ModelConfig of a model folder, or of the published folder of a family.

    Args:
      base: what to complete a language folder with: its sight, heads and options of running.
    """
    data = _read_config(directory)
    if source.is_family(directory):
        return source.open_source(directory, options).config
    if "vision" in data or "language" not in data and "model_type" not in data:
        return ModelConfig.from_dict(data)
    if base is None:
        raise ModelFolderError(
            f"{directory}: holds a language model alone; to train it with eyes, name model.preset "
            "for the rest and list the new parameters in init_missing"
        )
    language, _ = load_language(directory)
    running = {name: getattr(base.language, name) for name in _RUNNING}
    return dataclasses.replace(
        base, language=dataclasses.replace(language, **running), heads=(), tokens={},
        visual_offset=load_codec(directory).template.visual_offset,
    )  # fmt: skip


def holds_language_only(directory: epath.PathLike) -> bool:
    """Whether this is a language folder, ours or Hugging Face's."""
    data = _read_config(directory)
    if source.is_family(directory):
        return False
    return "vision" not in data and ("language" in data or "model_type" in data)


def load_language(directory: epath.PathLike) -> tuple[LanguageConfig, str]:
    """(config, dtype) of a language folder, ours or Hugging Face's."""
    data = _read_config(directory)
    if "model_type" in data:
        language = huggingface.open_language(directory)
        return language.config, language.dtype
    if data.get("format_version") != FORMAT_VERSION or data.keys() != _LANGUAGE_KEYS:
        raise ModelFolderError(
            f"{directory}/config.json: {sorted(data)} of format_version "
            f"{data.get('format_version')!r}; expected {sorted(_LANGUAGE_KEYS)} of version "
            f"{FORMAT_VERSION}"
        )
    try:
        config = LanguageConfig(**data["language"])
    except TypeError as error:  # an unknown or missing key
        raise ModelFolderError(f"{directory}/config.json: language: {error}") from error
    return dataclasses.replace(config, remat="", attention="auto"), data["dtype"]


def language_config_dict(config: LanguageConfig, dtype: str) -> dict[str, Any]:
    """What config.json of a language folder holds."""
    language = dataclasses.asdict(config)
    for name in _CHOSEN_BY_RUNS:
        del language[name]
    return {"format_version": FORMAT_VERSION, "language": language, "dtype": dtype}


def load_codec(directory: epath.PathLike, options: Options = None) -> TextCodec:
    """Tokenizer and template of a model folder, a language folder or a Hugging Face folder."""
    path = epath.Path(directory)
    if source.is_family(path):
        return source.open_codec(path, options)
    if not (path / "template.json").exists() and huggingface.model_type(path):
        return huggingface.open_codec(path)
    return TextCodec.load(path)


def open_leaves(directory: epath.PathLike, options: Options = None) -> dict[str, LazyArray]:
    """{path: array} of every parameter of a folder; only headers are read.

    Raises:
      ModelFolderError: a shard is missing or broken.
    """
    path = epath.Path(directory)
    if source.is_family(path):
        return source.open_source(path, options).leaves
    if huggingface.model_type(path):
        return huggingface.open_language(path).leaves
    leaves: dict[str, LazyArray] = {}
    try:
        for file in _shard_files(path):
            leaves |= read_file(file)
    except TensorFileError as error:
        raise ModelFolderError(str(error)) from error
    return leaves


def _read_config(directory: epath.PathLike) -> dict[str, Any]:
    path = epath.Path(directory) / "config.json"
    if not path.exists():
        raise ModelFolderError(
            f"{path}: missing, so {directory} is not a complete model folder; "
            "give the folder that training wrote (workdir/model)"
        )
    return json.loads(path.read_text())


def load_into(
    abstract: Any,
    directory: epath.PathLike,
    *,
    init_missing: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
    options: Options = None,
) -> Loaded:
    """Reads parameters by name into the shapes, dtypes and shardings asked for.

    Each process reads the bytes that its devices hold, once (`tensors.read_parts`); those whose
    devices hold rows of new tokens also read a token table, block by block, for its mean.

    Args:
      abstract: nested dict of jax.ShapeDtypeStruct; leaves with a sharding are placed by it, the
        others stay numpy. Floating leaves are cast to the dtype asked for.
      init_missing: regexes (anchored at the start of a path) of parameters that the folder may
        lack. Each must match at least one parameter.
      new_tokens: ids that the folder's model did not know (task tokens of added heads). Their
        rows in the token tables become the mean of the rows that were in use: an untrained row
        is noise, the mean is a neutral start. Tables without room for them are lengthened.

    Raises:
      ModelFolderError: lists every parameter that is missing, extra, or of another shape.
    """
    path = epath.Path(directory)
    wanted = flatten(abstract)
    missing = check_fits(
        abstract, path, init_missing=init_missing, new_tokens=new_tokens, options=options
    )
    have = _open_with_room(path, wanted, new_tokens, options)
    used_tokens = _used_tokens(path, new_tokens, options) if new_tokens else 0
    leaves: dict[str, jax.Array | np.ndarray] = {}
    for name in wanted:
        if name not in have:
            continue
        tensor = have[name]
        if new_tokens and name in _TOKEN_AXIS:
            tensor = _fill_new_tokens(tensor, _TOKEN_AXIS[name], used_tokens, new_tokens)
        leaves[name] = _place(tensor, wanted[name])
    return Loaded(leaves, missing)


def check_fits(
    abstract: Any,
    directory: epath.PathLike,
    *,
    init_missing: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
    options: Options = None,
) -> tuple[str, ...]:
    """Raises what `load_into` would raise, without reading a parameter; returns its `missing`."""
    path = epath.Path(directory)
    wanted = flatten(abstract)
    have = _open_with_room(path, wanted, new_tokens, options)
    missing = _check_names(path, wanted, {n: leaf.shape for n, leaf in have.items()}, init_missing)
    if new_tokens:
        _used_tokens(path, new_tokens, options)
    return missing


def _open_with_room(
    path: epath.Path, wanted: Mapping[str, Any], new_tokens: Sequence[int], options: Options
) -> dict[str, LazyArray]:
    """Leaves of the folder; a full token table gets room for new tokens."""
    have = open_leaves(path, options)
    if not new_tokens:
        return have
    tables = {name: axis for name, axis in _TOKEN_AXIS.items() if name in have and name in wanted}
    return have | {
        name: _with_room(have[name], axis, wanted[name].shape[axis])
        for name, axis in tables.items()
    }  # fmt: skip


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


def _to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, order="C")


def _write_json(path: epath.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


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


def _used_tokens(path: epath.Path, new_tokens: Sequence[int], options: Options) -> int:
    """Vocabulary size of the folder's own tokenizer."""
    used = load_codec(path, options).vocab_size
    if min(new_tokens) < used:
        raise ModelFolderError(
            f"{path}: token id {min(new_tokens)} is new to this model, but the folder's tokenizer "
            f"uses ids 0..{used - 1}; build the tokenizer from the folder's (tokenizer='')"
        )
    return used


def _fill_new_tokens(
    table: LazyArray, axis: int, used: int, new_tokens: Sequence[int]
) -> LazyArray:
    """The table with the rows (axis 0) or columns (axis 1) of `new_tokens` set to the mean of the
    first `used`. The mean is taken once, where one of them is read."""
    start = functools.cache(lambda: mean(table, axis, used).astype(table.dtype))

    def read(index: Index) -> np.ndarray:
        part, along = table[index], index[axis]
        new = [token - along.start for token in new_tokens if along.start <= token < along.stop]
        if new:
            np.moveaxis(part, axis, 0)[new] = start()[index[1 - axis]]
        return part

    return dataclasses.replace(table, read=read)


def _with_room(table: LazyArray, axis: int, size: int) -> LazyArray:
    """The table with at least `size` rows (axis 0) or columns (axis 1); new ones are zero."""
    if table.shape[axis] >= size:
        return table
    return resized(table, size) if axis == 0 else transposed(resized(transposed(table), size))


def _place(tensor: LazyArray, wanted: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
    """Reads what the devices of this process hold once, copies and shared rows of files too."""
    if wanted.sharding is None:
        return np.asarray(tensor).astype(wanted.dtype, copy=False)

    def box(index: tuple[slice, ...]) -> Box:
        return tuple(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True))

    held = wanted.sharding.addressable_devices_indices_map(tensor.shape).values()
    parts = read_parts(tensor, dict.fromkeys(map(box, held)), wanted.dtype)
    return jax.make_array_from_callback(
        tensor.shape, wanted.sharding, lambda index: parts[box(index)]
    )
