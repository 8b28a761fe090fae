"""The dtype of exported weights, and a config.json that says it.

Training keeps parameters in float32, published checkpoints are mostly half as large. What a
checkpoint carries unread, heads and adapters that lie beside it are not cast.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tpo_jax.errors import UserError
from tpo_jax.interop.tensors import BLOCK_BYTES, Index, LazyArray

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CHECKPOINT = "checkpoint"  # every tensor as the published folder has it
_FLOATING = (*DTYPES, "float64")
_ENTRIES = ("dtype", "torch_dtype")  # of config.json, since transformers 4.56 and before


class PrecisionError(UserError):
    """Weights that the chosen dtype cannot hold; the message names the tensor and the fix."""


def cast(
    tensors: Mapping[str, LazyArray], dtype: str | None,
    like: Mapping[str, LazyArray] | None = None,
) -> dict[str, LazyArray]:  # fmt: skip
    """Floating tensors in another dtype, converted when they are read; all others as they are.

    Args:
      dtype: one of DTYPES, or CHECKPOINT; None: as they are.
      like: tensors of the published folder by the same names, for CHECKPOINT.

    Reading raises:
      PrecisionError: a number is beyond what the dtype can hold.
    """
    out = dict(tensors)
    for name, tensor in tensors.items() if dtype else ():
        wanted = like[name].dtype if dtype == CHECKPOINT else np.dtype(DTYPES[dtype])
        if tensor.dtype.name in _FLOATING and tensor.dtype != wanted:
            out[name] = _cast(name, tensor, wanted)
    return out


def _cast(name: str, tensor: LazyArray, dtype: np.dtype) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        part = tensor[index]
        out = np.empty(part.shape, dtype)
        flat, ours = part.reshape(-1), out.reshape(-1)
        step = BLOCK_BYTES // tensor.dtype.itemsize
        for start in range(0, flat.size, step):
            block = flat[start : start + step]
            with np.errstate(over="ignore"):
                ours[start : start + step] = block.astype(dtype)
            lost = np.isfinite(block) & ~np.isfinite(ours[start : start + step])
            if lost.any():
                raise PrecisionError(
                    f"{name}: {block[lost][0]:g} is beyond {dtype.name}; export with "
                    "--dtype=bfloat16 or float32"
                )
        return out

    return dataclasses.replace(tensor, dtype=dtype, read=read)


def dtype_of(tensors: Mapping[str, LazyArray]) -> str:
    """The dtype of most of the floating numbers."""
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        if tensor.dtype.name in _FLOATING:
            sizes[tensor.dtype.name] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0]


def said_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that config.json names."""
    return next((config[name] for name in _ENTRIES if config.get(name)), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json that names this dtype, in its parts, too, where they name one."""
    out = {}
    for name, value in config.items():
        if name in _ENTRIES and value:
            value = dtype
        elif name.endswith("_config") and isinstance(value, Mapping) and said_dtype(value):
            value = with_dtype(value, dtype)
        out[name] = value
    return out if said_dtype(config) else out | {"torch_dtype": dtype}
