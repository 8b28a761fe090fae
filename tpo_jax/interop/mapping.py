"""Weight mappings are data: one table of rows drives both directions of a conversion.

A row names one leaf of ours and its tensor(s) on the other side. "{layer}" in the other side's key
stands for the index along the leading axis of a stacked leaf: one leaf of ours is then as many
tensors of theirs. Every leaf and every tensor is used exactly once or the conversion is refused.

Conversions are lazy: rows turn `LazyArray`s into `LazyArray`s, and nothing is read before somebody
asks for a part of the result. Numpy arrays go through as well and come out as numpy arrays.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.errors import UserError
from tpo_jax.interop.tensors import (
    Index,
    LazyArray,
    entry,
    lazy,
    led,
    resized,
    stacked,
    transposed,
    unled,
)

_SHOWN = 5  # tensors that an error names


class MappingError(UserError):
    """A leaf or a tensor that no row uses, that two rows use, or that has another shape."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and where it lives on the other side.

    Attributes:
      ours: parameter path, "/"-joined.
      theirs: tensor key; with "{layer}" the leaf is stacked over layers.
      transpose: the other side stores `[out, in]` where we store `[in, out]`.
      rows: (theirs, ours): length of the other side's first axis, which we lengthen with zeros.
      first, step: entry i of a stacked leaf is their layer first + i * step.
      count: entries of a stacked leaf; None: as many as the source has.
      lead: axes of length 1 that the other side's tensors have in front of ours.
      copies: further paths of ours with the same values, which must still agree on the way out.
      same: further keys of theirs with the same values, which must agree on the way in.
    """

    ours: str
    theirs: str
    transpose: bool = False
    rows: tuple[int, int] | None = None
    first: int = 0
    step: int = 1
    count: int | None = None
    lead: int = 0
    copies: tuple[str, ...] = ()
    same: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return self.ours, *self.copies

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def outward(self, leaf: Any) -> dict[str, LazyArray]:
        """Our leaf as the other side's tensors.

        Raises:
          MappingError: rows that the other side does not have are not zero.
        """
        leaf = lazy(leaf)
        if not self.stacked:
            return dict.fromkeys((self.theirs, *self.same), self._outward(leaf))
        return {
            self.theirs.format(layer=self.first + layer * self.step): self._outward(
                entry(leaf, layer)
            )
            for layer in range(leaf.shape[0])
        }

    def inward(self, tensors: Mapping[str, Any]) -> tuple[LazyArray, list[str]]:
        """The other side's tensors as our leaf, and the keys that were used.

        Raises:
          MappingError: a tensor is missing, or the layers are not numbered 0, 1, 2, ... or differ
            in shape or dtype.
        """
        if not self.stacked:
            if self.theirs not in tensors:
                raise MappingError(f"{self.ours}: tensor {self.theirs!r} is missing in the source")
            tensor = lazy(tensors[self.theirs])
            for key in self.same:
                tensor = self._agreeing(tensor, key, lazy(tensors[key]))
            return self._inward(tensor), [self.theirs, *self.same]
        keys = self._layer_keys(tensors)
        if not keys:
            raise MappingError(f"{self.ours}: no tensor {self.theirs!r} in the source")
        parts = [lazy(tensors[key]) for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
                raise MappingError(
                    f"{self.ours}: tensor {key!r} is {part.dtype}{list(part.shape)}, but "
                    f"{keys[0]!r} is {parts[0].dtype}{list(parts[0].shape)}"
                )
        return stacked([self._inward(part) for part in parts]), keys

    def _agreeing(self, tensor: LazyArray, key: str, other: LazyArray) -> LazyArray:
        """The tensor; what is read of it is read of `other` as well, and raises if they differ."""
        about = (
            f"{self.ours}: tensors {self.theirs!r} and {key!r} {{}}, but config.json has one table "
            "for both ends (tie_word_embeddings), and transformers ties them only where they are "
            "equal; if the model has two, write tie_word_embeddings=false in config.json, also in "
            "its text_config; if one of them is stale, remove it"
        )
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            kinds = (f"{x.dtype}{list(x.shape)}" for x in (tensor, other))
            raise MappingError(about.format(f"are {' and '.join(kinds)}"))

        def read(index: Index) -> np.ndarray:
            part, (rows, *rest) = tensor[index], index
            for start in range(rows.start, rows.stop, other.unit):
                stop = min(start + other.unit, rows.stop)
                here = slice(start - rows.start, stop - rows.start)
                same = part[here] == other[(slice(start, stop), *rest)]
                if not same.all():
                    row = start + int(np.argmin(same.all(axis=tuple(range(1, same.ndim)))))
                    raise MappingError(about.format(f"differ, first in row {row}"))
            return part

        return dataclasses.replace(tensor, read=read)

    def _layer_keys(self, names: Collection[str]) -> list[str]:
        """Their keys of our entries in order. Without `count` these are all that fit, which must
        run without a gap; layers between them, or beyond them, belong to other rows."""
        if self.count is not None:
            wanted = [self.first + i * self.step for i in range(self.count)]
            keys = [self.theirs.format(layer=layer) for layer in wanted]
            if missing := [key for key in keys if key not in names]:
                raise MappingError(f"{self.ours}: tensors {missing} are missing in the source")
            return keys
        return _layer_keys(self.theirs, names, self.first, self.step)

    def _outward(self, part: LazyArray) -> LazyArray:
        part = transposed(part) if self.transpose else part
        return led(self._cut(part), self.lead)

    def _cut(self, part: LazyArray) -> LazyArray:
        if self.rows is None or self.rows[0] == part.shape[0]:
            return part
        theirs = self.rows[0]
        if np.any(part[theirs:] != 0):
            raise MappingError(
                f"{self.ours}: entries from {theirs} on are not zero, but the other side has only "
                f"{theirs}; set num_tokens to what is in use"
            )
        return resized(part, theirs)

    def _inward(self, part: LazyArray) -> LazyArray:
        if part.shape[: self.lead] != (1,) * self.lead:
            raise MappingError(
                f"{self.ours}: tensor {self.theirs!r} is {list(part.shape)}, expected "
                f"{self.lead} axes of length 1 in front"
            )
        part = unled(part, self.lead)
        if self.rows is not None:
            if part.shape[0] != self.rows[0]:
                raise MappingError(
                    f"{self.ours}: tensor {self.theirs!r} has {part.shape[0]} rows, the "
                    f"configuration says {self.rows[0]}"
                )
            part = resized(part, self.rows[1])
        return transposed(part) if self.transpose else part


def _layer_keys(template: str, names: Iterable[str], first: int, step: int) -> list[str]:
    """Keys that fit `template`, of layers first, first + step, ... without a gap; layers between
    them belong to other rows."""
    pattern = re.compile(re.escape(template).replace(r"\{layer\}", r"(\d+)") + r"\Z")
    found = {int(m.group(1)): name for name in names if (m := pattern.match(name))}
    numbers = sorted(number for number in found if number % step == first)
    if numbers != [first + i * step for i in range(len(numbers))]:
        raise MappingError(
            f"{template!r}: layers {numbers} do not run from {first} in steps of {step}"
        )
    return [found[number] for number in numbers]


def export_leaves(rows: Sequence[Row], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Our flat leaves as the other side's tensors.

    Raises:
      MappingError: leaves without a row, rows without a leaf, or a key written twice, all named.
    """
    by_path = {path: row for row in rows for path in row.paths}
    if len(by_path) != sum(len(row.paths) for row in rows):
        raise MappingError("the table names a leaf twice")
    unmapped = sorted(set(leaves) - set(by_path))
    absent = sorted(set(by_path) - set(leaves))
    if unmapped or absent:
        raise MappingError(f"leaves without a row: {unmapped}; rows without a leaf: {absent}")
    tensors: dict[str, Any] = {}
    for path, leaf in leaves.items():
        row = by_path[path]
        if path in row.copies:
            if not np.array_equal(np.asarray(leaf), np.asarray(leaves[row.ours])):
                raise MappingError(
                    f"{path} and {row.ours} differ, but are one tensor {row.theirs!r} on the other "
                    "side; freeze both"
                )
            continue
        for key, tensor in row.outward(leaf).items():
            if key in tensors:
                raise MappingError(f"{path}: tensor {key!r} is written twice")
            tensors[key] = _like(leaf, tensor)
    return tensors


def import_leaves(
    rows: Sequence[Row], tensors: Mapping[str, Any], ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The other side's tensors as our flat leaves.

    Args:
      ignored: regular expressions of tensors that we know and do not want.

    Raises:
      MappingError: missing tensors, or tensors that no row uses and `ignored` does not name.
    """
    leaves: dict[str, Any] = {}
    used: set[str] = set()
    for row in rows:
        leaf, keys = row.inward(tensors)
        leaves |= dict.fromkeys(row.paths, _like(tensors[keys[0]], leaf))
        used.update(keys)
    rest = sorted(set(tensors) - used)
    unknown = [key for key in rest if not any(re.fullmatch(p, key) for p in ignored)]
    if unknown:
        raise MappingError(f"tensors that no row uses: {unknown}")
    return leaves


def check_shapes(
    where: str, rows: Sequence[Row], leaves: Mapping[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:  # fmt: skip
    """Refuses leaves that are not those of a configuration, by the names that their tensors have.

    Args:
      where: the folder that they were read from.
      rows: the table by which they were; leaves without a row have their own names.
      wanted: {parameter path: shape} of the model that the configuration describes.

    Raises:
      MappingError: a layer too many or too few, a tensor of another shape.
    """
    table = {path: row for row in rows for path in row.paths}
    lines = []
    for path in sorted(leaves):
        have, want = tuple(leaves[path].shape), wanted.get(path)
        if have == want or (want is None and path not in table):
            continue
        found, described = (_tensor_shapes(table.get(path), path, x) for x in (have, want))
        for key in sorted(found.keys() | described.keys()):
            if key not in found:
                lines.append(f"{key} is missing, expected {described[key]}")
            elif found[key] != described.get(key):
                lines.append(f"{key} is {found[key]}, expected {described.get(key, 'none')}")
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise MappingError(
            f"{where}: {len(lines)} tensors are not what config.json describes: "
            f"{'; '.join(sorted(lines)[:_SHOWN])}{more}; the files are of different models, or not "
            "all are there; copy them again, or correct config.json"
        )


def _tensor_shapes(
    row: Row | None, path: str, shape: tuple[int, ...] | None
) -> dict[str, list[int]]:
    """{tensor name: its shape} of a leaf of that shape."""
    if shape is None:
        return {}
    if row is None:
        return {path: list(shape)}

    def zeros(index: Index) -> np.ndarray:
        return np.zeros([s.stop - s.start for s in index], np.float32)

    leaf = LazyArray(shape, np.dtype(np.float32), zeros)
    return {key: list(tensor.shape) for key, tensor in row.outward(leaf).items()}


def _like(source: Any, result: LazyArray) -> Any:
    return result if isinstance(source, LazyArray) else np.asarray(result, order="C")


def llama_rows(
    *,
    tied: bool,
    qkv_bias: bool,
    output_bias: bool = False,
    qk_norm: bool = False,
    vocabulary: tuple[int, int] | None = None,
    prefix: str = "language/",
    body: str = "model.",
    head: str = "lm_head.weight",
    stored: Collection[str] = (),
) -> list[Row]:
    """Rows between our language model and Hugging Face's Llama, Mistral, Qwen2 and Qwen3.

    The key names are those of `transformers`' modeling_llama.py, modeling_mistral.py,
    modeling_qwen2.py and modeling_qwen3.py.

    Args:
      vocabulary: rows of the token tables, (theirs, ours).
      body, head: where the model is on the other side; a multimodal one has it at another place.
      stored: tensor names of the other side; one that has the output table of a tied model as
        well keeps it, a copy of the table.
    """
    layer = body + "layers.{layer}."
    rows = [
        Row(f"{prefix}embed/table", f"{body}embed_tokens.weight", rows=vocabulary,
            same=(head,) if tied and head in stored else ()),
        Row(f"{prefix}final_norm/scale", f"{body}norm.weight"),
    ]  # fmt: skip
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{prefix}layers/{name}/scale", f"{layer}{name}.weight"))
    for name in ("q_norm", "k_norm") if qk_norm else ():
        rows.append(
            Row(f"{prefix}layers/self_attn/{name}/scale", f"{layer}self_attn.{name}.weight")
        )
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        path, key = f"{prefix}layers/self_attn/{name}/", f"{layer}self_attn.{name}."
        rows.append(Row(path + "kernel", key + "weight", transpose=True))
        if output_bias if name == "o_proj" else qkv_bias:
            rows.append(Row(path + "bias", key + "bias"))
    rows += [
        Row(f"{prefix}layers/mlp/{n}/kernel", f"{layer}mlp.{n}.weight", transpose=True)
        for n in ("gate_proj", "up_proj", "down_proj")
    ]
    if not tied:
        rows.append(Row(f"{prefix}lm_head/kernel", head, transpose=True, rows=vocabulary))
    return rows
