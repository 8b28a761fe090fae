"""Weight mappings are data: one table of rows drives both directions of a conversion.

A row names one leaf of ours and its tensor(s) on the other side. "{layer}" in the other side's key
stands for the index along the leading axis of a stacked leaf: one leaf of ours is then as many
tensors of theirs. Every leaf and every tensor is used exactly once or the conversion is refused.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


class MappingError(ValueError):
    """A leaf or a tensor that no row uses, that two rows use, or that has another shape."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and where it lives on the other side.

    Attributes:
      ours: parameter path, "/"-joined.
      theirs: tensor key; with "{layer}" the leaf is stacked over layers.
      transpose: the other side stores `[out, in]` where we store `[in, out]`.
    """

    ours: str
    theirs: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def _oriented(self, leaf: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(leaf, -1, -2)) if self.transpose else leaf

    def outward(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
        """Our leaf as the other side's tensors."""
        if not self.stacked:
            return {self.theirs: self._oriented(leaf)}
        return {
            self.theirs.format(layer=layer): self._oriented(part)
            for layer, part in enumerate(leaf)
        }

    def inward(self, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """The other side's tensors as our leaf, and the keys that were used.

        Raises:
          MappingError: a tensor is missing, or the layers are not numbered 0, 1, 2, ...
        """
        if not self.stacked:
            if self.theirs not in tensors:
                raise MappingError(f"{self.ours}: tensor {self.theirs!r} is missing in the source")
            return self._oriented(tensors[self.theirs]), [self.theirs]
        keys = _layer_keys(self.theirs, tensors)
        if not keys:
            raise MappingError(f"{self.ours}: no tensor {self.theirs!r} in the source")
        return np.stack([self._oriented(tensors[key]) for key in keys]), keys


def _layer_keys(template: str, names: Iterable[str]) -> list[str]:
    """Keys that fit `template`, in layer order, which must be 0, 1, 2, ... without a gap."""
    pattern = re.compile(re.escape(template).replace(r"\{layer\}", r"(\d+)") + r"\Z")
    found = {int(m.group(1)): name for name in names if (m := pattern.match(name))}
    if sorted(found) != list(range(len(found))):
        raise MappingError(f"{template!r}: layers {sorted(found)} are not 0..{len(found) - 1}")
    return [found[i] for i in range(len(found))]


def export_leaves(rows: Sequence[Row], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our flat leaves as the other side's tensors.

    Raises:
      MappingError: leaves without a row, rows without a leaf, or a key written twice, all named.
    """
    by_path = {row.ours: row for row in rows}
    if len(by_path) != len(rows):
        raise MappingError("the table names a leaf twice")
    unmapped = sorted(set(leaves) - set(by_path))
    absent = sorted(set(by_path) - set(leaves))
    if unmapped or absent:
        raise MappingError(f"leaves without a row: {unmapped}; rows without a leaf: {absent}")
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        for key, tensor in by_path[path].outward(np.asarray(leaf)).items():
            if key in tensors:
                raise MappingError(f"{path}: tensor {key!r} is written twice")
            tensors[key] = tensor
    return tensors


def import_leaves(
    rows: Sequence[Row], tensors: Mapping[str, np.ndarray], ignored: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The other side's tensors as our flat leaves.

    Args:
      ignored: regular expressions of tensors that we know and do not want.

    Raises:
      MappingError: missing tensors, or tensors that no row uses and `ignored` does not name.
    """
    leaves: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for row in rows:
        leaves[row.ours], keys = row.inward(tensors)
        used.update(keys)
    rest = sorted(set(tensors) - used)
    unknown = [key for key in rest if not any(re.fullmatch(p, key) for p in ignored)]
    if unknown:
        raise MappingError(f"tensors that no row uses: {unknown}")
    return leaves


def llama_rows(*, tied: bool, qkv_bias: bool, prefix: str = "language/") -> list[Row]:
    """Rows between our language model and Llama, Mistral or Qwen2 in the Hugging Face layout.

    The key names are those of `transformers`' modeling_llama.py and modeling_qwen2.py.
    """
    layer = "model.layers.{layer}."
    rows = [
        Row(f"{prefix}embed/table", "model.embed_tokens.weight"),
        Row(f"{prefix}final_norm/scale", "model.norm.weight"),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Row(f"{prefix}layers/{name}/scale", f"{layer}{name}.weight"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        path, key = f"{prefix}layers/self_attn/{name}/", f"{layer}self_attn.{name}."
        rows.append(Row(path + "kernel", key + "weight", transpose=True))
        if qkv_bias and name != "o_proj":
            rows.append(Row(path + "bias", key + "bias"))
    rows += [
        Row(f"{prefix}layers/mlp/{n}/kernel", f"{layer}mlp.{n}.weight", transpose=True)
        for n in ("gate_proj", "up_proj", "down_proj")
    ]
    if not tied:
        rows.append(Row(f"{prefix}lm_head/kernel", "lm_head.weight", transpose=True))
    return rows
