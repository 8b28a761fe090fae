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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from tpo_jax.models.config import ModelConfig
from tpo_jax.models.video_language import FunctionalModel, Outputs
from tpo_jax.parallel.paths import flatten, map_with_path
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
    return _forward(model_config, batch)[0]


class _Heads(NamedTuple):
    """Heads as they were traced, of (params, outputs, batch)."""

    trace: Any
    arguments: tuple[Any, Outputs, Any]
    predictions: dict[str, Any]


def _forward(model_config: ModelConfig, batch: Any) -> tuple[dict[str, float], _Heads]:
    """`forward_flops`, and the program of the heads among it."""
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
    flops = {
        "vision": vision,
        "language": rest,
        "lm_head": matmul_flops(lambda p, o, b: answer_scores(model.bind(p), o, b), params,
                                outputs, batch),
        "heads": traced_flops(heads),
    }  # fmt: skip
    return flops, _Heads(heads, (params, outputs, batch), predictions)


def train_flops(
    model_config: ModelConfig, batch: Any, trained: Collection[str], weights: Mapping[str, float]
) -> float:
    """FLOPs that one train step over a global batch needs, the numerator of MFU.

    A part runs forward once. Where something in it or before it is trained, the gradient of its
    activations costs as much again; the gradient of its weights, the share of them that is trained.
    Attention between frozen weights is counted like them, so a little low. Of heads every product
    is counted by itself: a frozen network in a head has no gradient behind what prompts it, and
    losses of weight 0 have none at all.

    Args:
      trained: paths of the leaves that are trained.
      weights: {term: weight in the loss}, of `Objective.weights`.
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
    }
    forward, heads = _forward(model_config, batch)
    total = forward.pop("heads")
    if heads.predictions:
        total += _heads_gradient(heads, trained, weights, passed["language"])
    for part, flops in forward.items():
        here = [path for path in sizes if parts[path] == part]
        weights = sum(sizes[path] for path in here)
        share = sum(sizes[path] for path in here if path in trained) / max(weights, 1)
        total += flops * (1 + passed[part] + share)
    return total


def _heads_gradient(
    heads: _Heads, trained: Collection[str], weights: Mapping[str, float], through_language: bool
) -> float:
    """FLOPs of the gradient of the heads that have a loss."""
    params, outputs, batch = heads.arguments
    encoder = any(path.startswith("vision/") for path in trained)

    def all_of(tree: Any, value: bool) -> Any:
        return jax.tree.map(lambda _: value, tree)

    moved = dataclasses.replace(
        all_of(outputs, through_language), encoded=all_of(outputs.encoded, encoder)
    )
    moved = map_with_path(lambda path, _: path in trained, params), moved, all_of(batch, False)
    asked = {term.split("/")[0] for term, weight in weights.items() if weight}
    read = {name: all_of(found, name in asked) for name, found in heads.predictions.items()}
    jaxpr = heads.trace.jaxpr
    results = [v for v, kept in zip(jaxpr.outvars, jax.tree.leaves(read), strict=True) if kept]
    return _gradient(jaxpr, jax.tree.leaves(moved), results)[0]


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


def _gradient(
    jaxpr: Any, moved: Sequence[bool], results: Sequence[Any] | None = None
) -> tuple[float, list[bool]]:
    """FLOPs of the gradient of `results` (None: of all): a product costs as much again for each
    operand that depends on an input that is `moved`. And which outputs do."""
    reached = {var for var, hit in zip(jaxpr.invars, moved, strict=True) if hit}
    total = 0.0
    for equation in _differentiated(jaxpr, jaxpr.outvars if results is None else results):
        hit = [var in reached for var in map(_place, equation.invars)]
        if any(hit):
            flops, out = _equation_gradient(equation, hit)
            total += flops
            reached.update(v for v, h in zip(equation.outvars, out, strict=True) if h)
    return total, [var in reached for var in map(_place, jaxpr.outvars)]


def _differentiated(jaxpr: Any, results: Sequence[Any]) -> list[Any]:
    """The equations that a gradient of `results` goes through, in order: none that ends in integers
    or stops it."""
    wanted, kept = set(map(_place, results)), []
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name != "stop_gradient" and wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(map(_place, equation.invars))
    return kept[::-1]


def _place(var: Any) -> Any:
    """A variable that can have a gradient, or None."""
    real = not isinstance(var, Literal) and jnp.issubdtype(var.aval.dtype, jnp.inexact)
    return var if real else None


def _equation_gradient(equation: Any, hit: Sequence[bool]) -> tuple[float, Sequence[bool]]:
    """FLOPs of the gradient of one equation, and which of its results a gradient reaches.

    hit: for each operand, whether it does.
    """
    name, bodies = equation.primitive.name, sub_programs(equation)
    if name == "dot_general":
        return sum(hit) * _dot_flops(equation), [True]
    if name == "conv_general_dilated":
        return sum(hit) * _conv_flops(equation), [True]
    if name == "cond":
        flops, outs = zip(*(_gradient(body, hit[1:]) for body in bodies), strict=True)
        return max(flops), [any(out) for out in zip(*outs, strict=True)]
    if name == "scan":
        return _scan_gradient(equation, hit)
    if len(bodies) == 1:
        return _gradient(bodies[0], hit)
    return 0.0, [True] * len(equation.outvars)


def _scan_gradient(equation: Any, hit: Sequence[bool]) -> tuple[float, Sequence[bool]]:
    """`_equation_gradient` of a loop, where what one turn carries is reached in the next."""
    (body,), hit = sub_programs(equation), list(hit)
    # Operands are constants, what is carried and what is scanned; results what is carried and what
    # is stacked. The last of each have an axis more outside, and jax no one name for the others.
    count = _of_equal_rank(equation.outvars, body.outvars)
    first = _of_equal_rank(equation.invars, body.invars) - count
    while True:
        flops, out = _gradient(body, hit)
        before = hit[first : first + count]
        carried = [a or b for a, b in zip(before, out[:count], strict=True)]
        if carried == before:
            return equation.params["length"] * flops, out
        hit[first : first + count] = carried


def _of_equal_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(one.aval.shape) == len(other.aval.shape) for one, other in pairs)


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
