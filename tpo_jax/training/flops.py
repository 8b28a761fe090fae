"""Analytic FLOPs of a step, counted from the traced forward pass.

XLA's own cost analysis counts the body of a scan once, so it cannot be used for stacked layers. We
count matrix products: 2 * b * m * n * k for every dot_general of shape [b, m, k] x [b, k, n] in the
traced program, times the length of every scan around it. Elementwise work is left out.

Conventions (as in PaLM, arXiv 2204.02311, appendix B): attention is counted dense, without the
discount of a causal mask; where everything is trained a step is 3 x forward (backward costs 2 x
forward), without rematerialisation. What a step does not compute for frozen weights is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.topologies import CHIPS
from tpo_jax.training.objective import answer_scores

# What JAX calls a TPU -> generation.
_TPUS = {
    "TPU v4": "v4", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip
# What JAX calls a whole GPU (not a slice of one) -> published dense bfloat16 FLOP/s. NVIDIA's data
# sheets of H100 and H200 give twice as much, "with sparsity".
_GPUS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Published bfloat16 FLOP/s of all `devices`; None where a kind is not known."""
    peaks = [_peak_of(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)


def _peak_of(kind: str) -> float | None:
    return CHIPS[_TPUS[kind]].peak if kind in _TPUS else _GPUS.get(kind)


def forward_flops(model_config: ModelConfig, batch: Any) -> dict[str, float]:
    """FLOPs of one forward pass over a global batch, by part.

    Args:
      batch: arrays or ShapeDtypeStructs of the global batch.

    Returns:
      {"vision", "language", "lm_head", "heads"}; vision holds encoder and connector.
    """
    # The plain attention path is the one whose products are visible in the trace.
    language = dataclasses.replace(model_config.language, attention="dense", remat="")
    model = FunctionalModel(dataclasses.replace(model_config, language=language))
    params = model.abstract()

    def encode(params: Any, batch: Any) -> Any:
        return model.bind(params).encode_batch(batch)

    def decode(params: Any, batch: Any) -> Any:
        return model.bind(params)(batch)

    def run_heads(params: Any, outputs: Any, batch: Any) -> Any:
        return model.bind(params).run_heads(outputs, batch)

    decoded, outputs = jax.make_jaxpr(decode, return_shape=True)(params, batch)
    vision = matmul_flops(encode, params, batch)
    rest = _count(decoded.jaxpr) - vision
    heads, predictions = jax.make_jaxpr(run_heads, return_shape=True)(params, outputs, batch)
    if not predictions:
        # What heads alone read does not run, such as the whole of an image whose tiles are shown:
        # the compiler drops it where heads have no slot in a batch.
        vision = matmul_flops(lambda p, b: encode(p, b).visual, params, batch)
    return {
        "vision": vision,
        "language": rest,
        "lm_head": matmul_flops(lambda p, o, b: answer_scores(model.bind(p), o, b), params,
                                outputs, batch),
        "heads": traced_flops(heads),
    }  # fmt: skip


def train_flops(model_config: ModelConfig, batch: Any, trained: Collection[str]) -> float:
    """FLOPs that one train step over a global batch needs, the numerator of MFU.

    A part runs forward once. Where something in it or before it is trained, the gradient of its
    activations costs as much again; the gradient of its weights, the share of them that is trained.
    Attention between frozen weights is counted like them, so a little low.

    Args:
      trained: paths of the leaves that are trained.
    """
    sizes = {
        path: leaf.size for path, leaf in flatten(FunctionalModel(model_config).abstract()).items()
    }
    parts = {path: _part(path, model_config) for path in sizes}
    found = {parts[path] for path in trained}
    passed = {
        "vision": any(path.startswith("vision/") for path in trained),
        "language": bool(found - {"lm_head", "heads"}),
        "lm_head": bool(found - {"lm_head", "heads"}),
        "heads": bool(found - {"lm_head"}),
    }
    total = 0.0
    for part, flops in forward_flops(model_config, batch).items():
        here = [path for path in sizes if parts[path] == part]
        weights = sum(sizes[path] for path in here)
        share = sum(sizes[path] for path in here if path in trained) / max(weights, 1)
        total += flops * (1 + passed[part] + share)
    return total


def _part(path: str, model_config: ModelConfig) -> str:
    """Of `forward_flops`, or "tokens": rows that are looked up, with no product of their own."""
    top, *rest = path.split("/")
    if top in ("vision", "connector"):
        return "vision"
    if top == "heads":
        return top
    if path == "language/embed/table":
        return "lm_head" if model_config.language.tied_head else "tokens"
    if top == "language":
        return "lm_head" if rest[0] == "lm_head" else "language"
    return "tokens"


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all matrix products of `function`, which is traced on abstract arguments."""
    return traced_flops(jax.make_jaxpr(function)(*args))


def traced_flops(trace: Any) -> float:
    """The same of a program that jax.make_jaxpr has traced."""
    return _count(trace.jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in needed_equations(jaxpr):
        if equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
            continue
        if equation.primitive.name == "conv_general_dilated":
            total += _conv_flops(equation)
            continue
        inner = [_count(sub) for sub in sub_programs(equation)]
        if equation.primitive.name == "cond":  # one branch runs
            total += max(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            total += sum(inner)
    return total


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth


def _conv_flops(equation: Any) -> float:
    """Every output reads one kernel; products with padding count."""
    kernel = equation.invars[1].aval.shape
    features_out = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    depth = math.prod(kernel) / features_out
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth


def needed_equations(jaxpr: Any) -> list[Any]:
    """The equations that results depend on, in order; the compiler drops the others."""
    wanted = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(var for var in equation.invars if not isinstance(var, Literal))
    return kept[::-1]


def sub_programs(equation: Any) -> list[Any]:
    """Programs nested in an equation: of pjit, scan, cond, remat, custom derivatives."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # a closed jaxpr holds a jaxpr
            if hasattr(item, "eqns"):
                found.append(item)
    return found
