"""Low-rank adapters: merged into their kernels, or in and out of the layout of PEFT.

    adapter_config.json         rank, alpha and the modules that have an adapter
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight and lora_B.weight

PEFT stores A as [rank, in] and B as [out, rank]; ours are transposed and stacked over layers. The
rows are those of the model's own table: an adapter lies where its kernel lies.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tpo_jax.errors import UserError
from tpo_jax.interop import huggingface
from tpo_jax.interop.mapping import MappingError, Row, export_leaves, import_leaves
from tpo_jax.interop.tensors import Index, LazyArray, read_file, write_file
from tpo_jax.models.config import LoraConfig

_PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
# Options of PEFT that change what an adapter computes, with the value that ours has.
_ONLY = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
    "fan_in_fan_out": False, "trainable_token_indices": None, "target_parameters": None,
    "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False,
    "lora_bias": False, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None,
}  # fmt: skip
_MERGE = "merge the adapter with PEFT (merge_and_unload) and import the result"
# PEFT cannot merge these: what an adapter does depends on the token, or its input is pooled.
_NO_MERGE = "PEFT does not merge such an adapter either, so train a plain LoRA"
_FIXES = dict.fromkeys(("alora_invocation_tokens", "use_qalora", "arrow_config"), _NO_MERGE)
# Initialisations that leave the base as it is.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class AdapterError(UserError):
    """An adapter that has no counterpart on the other side; the message names it and the fix."""


def write_adapter(
    out: epath.Path, leaves: Mapping[str, LazyArray], config: LoraConfig, rows: Sequence[Row],
    whole_names: bool = False,
) -> None:
    """Writes the PEFT folder of the adapters among `leaves`.

    Args:
      leaves: of the whole model.
      rows: the table of the model on the other side.
      whole_names: say which modules have an adapter by their whole names; a multimodal model has
        a q_proj in its tower as well.

    Raises:
      AdapterError: a kernel without a row, or that is no linear layer there, has one.
    """
    adapters = {p: x for p, x in leaves.items() if p.endswith(("/lora_a", "/lora_b"))}
    by_kernel = {row.ours: row for row in rows if row.transpose}
    kernels = sorted({path[: -len("lora_a")] + "kernel" for path in adapters})
    if alien := [kernel for kernel in kernels if kernel not in by_kernel]:
        raise AdapterError(
            f"{alien[0]}: has an adapter, but is no linear layer of the model on the other side, "
            "so PEFT has no module for it; export with the adapters merged"
        )
    chosen = [by_kernel[kernel] for kernel in kernels]
    tensors = export_leaves(_adapter_rows(chosen), adapters)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": _modules(chosen) if whole_names else sorted({_module(r) for r in chosen}),
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")


def read_adapter(
    directory: epath.PathLike, rows: Sequence[Row], leaves: Mapping[str, LazyArray]
) -> tuple[dict[str, LazyArray], LoraConfig]:
    """(adapter leaves, their LoraConfig) of a PEFT folder.

    Args:
      rows: the table of the language model that the adapter is for.
      leaves: of that model.

    Raises:
      AdapterError: an option that this program does not have, or an adapter of other weights.
      MappingError: tensors of modules that the model does not have, or of some of its layers only.
    """
    path = epath.Path(directory)
    if not (path / "adapter_config.json").exists():
        raise AdapterError(f"{path / 'adapter_config.json'}: missing; give a folder of PEFT")
    about = json.loads((path / "adapter_config.json").read_text())
    _check_options(path / "adapter_config.json", about)
    if (path / "non_lora_trainables.bin").exists():  # LLaVA's trainers: the connector
        raise AdapterError(
            f"{path / 'non_lora_trainables.bin'}: holds weights that were trained beside the "
            "adapter, as a pickle; merge both where they were trained and import the result"
        )
    tensors = read_file(_weights(path))
    chosen = [
        row for row in rows
        if row.transpose and any(_pattern(row).match(name) for name in tensors)
    ]  # fmt: skip
    tensors = _without_copies(path, tensors, chosen, leaves)
    adapters = import_leaves(_adapter_rows(chosen), tensors)
    rank = about["r"]
    wrong = [p for p, x in adapters.items() if rank != x.shape[-1 if p.endswith("a") else -2]]
    if wrong:
        raise AdapterError(f"{path}: {wrong[0]} has not the rank r={rank} of adapter_config.json")
    alpha = about["lora_alpha"] * (rank**0.5 if about.get("use_rslora") else 1)
    names = "|".join(sorted({re.escape(row.ours) for row in chosen}))
    dropout = float(about.get("lora_dropout", 0.0))
    return adapters, LoraConfig(f"^({names})$", rank, float(alpha), dropout)


def _check_options(file: epath.Path, about: Mapping[str, Any]) -> None:
    """Refuses an adapter that computes something else than kernel + scale * a @ b."""
    for option, only in _ONLY.items():
        if (value := about.get(option, only)) not in (only, None):
            fix = _FIXES.get(option, _MERGE)
            raise AdapterError(
                f"{file}: {option}={value!r}: this program has only {only!r}; {fix}"
            )
    start = about.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start  # as PEFT reads it
    if start not in (*_PLAIN_STARTS, None):
        raise AdapterError(
            f"{file}: init_lora_weights={start!r}: the adapter began with a part of the base's "
            "weights, which were changed for it, so it does not fit those of the source; where it "
            "was trained, merge it (merge_and_unload) and import the result; PEFT also saves "
            "pissa, olora, corda and lora_ga as a plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _without_copies(
    path: epath.Path,
    tensors: Mapping[str, LazyArray],
    rows: Sequence[Row],
    leaves: Mapping[str, LazyArray],
) -> dict[str, LazyArray]:
    """The tensors without the kernels that PEFT saves beside an adapter of the output table."""
    left = dict(tensors)
    for row in rows:
        copy = left.pop(f"{_PREFIX}{row.theirs.removesuffix('weight')}base_layer.weight", None)
        if copy is None:
            continue
        ours = row.outward(leaves[row.ours])[row.theirs]
        if copy.shape != ours.shape or any(
            not np.array_equal(a.astype(np.float32), b.astype(np.float32))
            for a, b in zip(copy.blocks(), ours.blocks(), strict=True)
        ):
            raise AdapterError(
                f"{path}: holds another {row.theirs} than the source; the adapter was trained on "
                "other weights"
            )
    return left


def module_names(directory: epath.PathLike) -> list[str]:
    """Names of the weights of a PEFT folder, as the model that it adapts has them in memory.

    Raises:
      AdapterError: no such folder.
    """
    names = read_file(_weights(epath.Path(directory)))
    return [name.removeprefix(_PREFIX) for name in names]


def _weights(path: epath.Path) -> epath.Path:
    file = path / "adapter_model.safetensors"
    if not file.exists():
        if (path / _PICKLE).exists():  # of older PEFT, and of LLaVA's trainers
            raise AdapterError(huggingface.pickle_message(path, [_PICKLE], file.name))
        raise AdapterError(f"{file}: missing; copy the folder again")
    return file


def without_adapters(leaves: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The leaves of the base, as it is."""
    return {p: leaf for p, leaf in leaves.items() if not p.endswith(("/lora_a", "/lora_b"))}


def with_kept(
    leaves: Mapping[str, LazyArray], directory: epath.PathLike, rows: Sequence[Row]
) -> tuple[dict[str, LazyArray], LoraConfig]:
    """Leaves of a model with the adapter of a PEFT folder as leaves of their own, and its sizes.

    Raises:
      AdapterError, MappingError: what `read_adapter` raises, or the model has adapters itself.
    """
    if own := [path for path in leaves if path.endswith("/lora_a")]:
        raise AdapterError(
            f"{directory}: the source has adapters of its own, such as {own[0]}; merge them first"
        )
    adapters, config = read_adapter(directory, rows, leaves)
    return with_adapters(leaves, adapters), config


def with_merged(
    leaves: Mapping[str, LazyArray], directory: epath.PathLike, rows: Sequence[Row]
) -> dict[str, LazyArray]:
    """Leaves of a model with the adapter of a PEFT folder merged into them; raises what `with_kept`
    raises."""
    return merged_leaves(*with_kept(leaves, directory, rows))


def merged_leaves(leaves: Mapping[str, LazyArray], config: LoraConfig) -> dict[str, LazyArray]:
    """Leaves of the same model without adapters: kernel + scale * a @ b, read on demand."""
    out = {}
    for path, leaf in leaves.items():
        stem, _, name = path.rpartition("/")
        if name in ("lora_a", "lora_b"):
            continue
        a = leaves.get(f"{stem}/lora_a")
        if name == "kernel" and a is not None:
            leaf = _merged(leaf, a, leaves[f"{stem}/lora_b"], config.scale)
        out[path] = leaf
    return out


def with_adapters(
    leaves: Mapping[str, LazyArray], adapters: Mapping[str, LazyArray]
) -> dict[str, LazyArray]:
    """Both together.

    Raises:
      MappingError: an adapter does not fit its kernel.
    """
    for path, adapter in adapters.items():
        kernel = leaves[path.rpartition("/")[0] + "/kernel"].shape
        a_side = path.endswith("lora_a")
        fits = adapter.shape[:-2] == kernel[:-2] and (
            adapter.shape[-2] == kernel[-2] if a_side else adapter.shape[-1] == kernel[-1]
        )
        if not fits:
            raise MappingError(
                f"{path}: adapter {list(adapter.shape)} does not fit the kernel {list(kernel)}"
            )
    return {**leaves, **adapters}


def _merged(kernel: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        *lead, rows, columns = index
        low, high = a[(*lead, rows, slice(None))], b[(*lead, slice(None), columns)]
        delta = scale * (low.astype(np.float32) @ high.astype(np.float32))
        return kernel[index] + delta.astype(kernel.dtype)

    return dataclasses.replace(kernel, read=read)


def _adapter_rows(kernels: Sequence[Row]) -> list[Row]:
    """Rows of lora_a and lora_b beside the rows of their kernels."""
    rows = []
    for row in kernels:
        stem, module = row.ours.removesuffix("kernel"), row.theirs.removesuffix("weight")
        a = Row(stem + "lora_a", f"{_PREFIX}{module}lora_A.weight", transpose=True)
        b = Row(stem + "lora_b", f"{_PREFIX}{module}lora_B.weight", transpose=True)
        rows += [a, dataclasses.replace(b, rows=row.rows)]  # B has a row a token
    return rows


def _module(row: Row) -> str:
    """PEFT's target module: "model.layers.{layer}.mlp.up_proj.weight" -> "up_proj"."""
    return row.theirs.split(".")[-2]


def _modules(rows: Sequence[Row]) -> str:
    """PEFT's target modules as one regular expression, which has to match a whole name."""
    names = (re.escape(row.theirs.removesuffix(".weight")) for row in rows)
    return "|".join(name.replace(r"\{layer\}", r"\d+") for name in names)


def _pattern(row: Row) -> re.Pattern[str]:
    key = re.escape(_PREFIX + row.theirs.removesuffix("weight")).replace(r"\{layer\}", r"\d+")
    return re.compile(key + r"lora_A\.weight\Z")

