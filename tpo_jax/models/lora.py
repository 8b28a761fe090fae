"""Low-rank adapters (Hu et al. 2021, 2106.09685) as extra leaves beside the kernels they adapt.

`attach` adds `lora_a`, `lora_b` to every Linear whose kernel path matches the pattern, stacked
layers included; with `lora_b` = 0 the model is unchanged. `merge` folds them into the kernels.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.errors import UserError
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.layers import Linear, Rngs


def attach(model: nnx.Module, config: LoraConfig, rngs: Rngs) -> None:
    """Adds adapters in place, before the model is split.

    Raises: ValueError if the pattern matches no kernel.
    """
    pattern = re.compile(config.pattern)
    kernels = {
        "/".join((*map(str, path), "kernel")): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    chosen = {path: module for path, module in kernels.items() if pattern.search(path)}
    if not chosen:
        raise UserError(
            f"model config: lora.pattern={config.pattern!r} matches no kernel; kernels are e.g. "
            f"{sorted(kernels)[:3]}"
        )
    for path in sorted(chosen):
        module = chosen[path]
        *lead, features_in, features_out = module.kernel[...].shape
        draw = jax.random.normal(
            rngs.params(), (*lead, features_in, config.rank), jnp.float32
        )
        zeros = jnp.zeros((*lead, config.rank, features_out), jnp.float32)
        # The attributes were None until now; nnx.data says that they become parameters.
        module.lora_a = nnx.data(nnx.Param(draw * features_in**-0.5))
        module.lora_b = nnx.data(nnx.Param(zeros))
        module.lora_scale, module.lora_dropout = config.scale, config.dropout


def merge(params: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """kernel + scale * a @ b for every adapted kernel; the result has no adapter leaves.

    Args:
      params: nested dict of arrays of a model with `config`.

    Returns: params of the same model with `lora=None`.
    """
    if "lora_a" in params:
        delta = params["lora_a"] @ params["lora_b"]
        kernel = params["kernel"] + (config.scale * delta).astype(params["kernel"].dtype)
        rest = {k: v for k, v in params.items() if k not in ("kernel", "lora_a", "lora_b")}
        return {"kernel": kernel, **rest}
    return {
        name: merge(value, config) if isinstance(value, dict) else value
        for name, value in params.items()
    }
