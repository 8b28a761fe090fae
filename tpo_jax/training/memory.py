"""Memory that a program needs, counted from its trace: an estimate where compiling costs too much.

A value lives from the equation that makes it to the last one that reads it; the peak is the most
that lives at one time. What the compiler does is followed in its effect, not in its detail: an
elementwise result takes the place of an operand that ends there, broadcasts and views cost
nothing, a scan holds one iteration beside what it stacks. A value that has the shape of a
parameter (a gradient, a cast) is split over the mesh as the parameter is, one with the tokens of a
long row as they are.

experiments/results/plans/ holds what the estimates were against the compiler's own figures.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import Literal

from tpo_jax.training.flops import needed_equations, sub_programs


@dataclasses.dataclass(frozen=True)
class Split:
    """Over how many devices values are split that a trace shows whole.

    shapes: {shape of a parameter: devices}. lengths: {size of an axis: devices}, wherever it is.
    clips: {size of the second axis: devices}, of values with four axes or more. Inside a shard_map
    a trace shows what one device has, but for parameters.
    """

    shapes: Mapping[tuple[int, ...], int] = dataclasses.field(default_factory=dict)
    lengths: Mapping[int, int] = dataclasses.field(default_factory=dict)
    clips: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def devices(self, shape: tuple[int, ...]) -> int:
        if shape in self.shapes:
            return self.shapes[shape]
        clip = self.clips.get(shape[1], 1) if len(shape) >= 4 else 1
        return max([clip, *(self.lengths.get(size, 1) for size in shape)])

    def inside(self, equation: Any) -> "Split":
        """What holds in the programs of an equation."""
        return Split(self.shapes) if equation.primitive.name == "shard_map" else self


# Nothing is stored for these: who reads them reads their operand.
_VIEWS = frozenset({
    "broadcast_in_dim", "iota", "reshape", "squeeze", "stop_gradient", "sharding_constraint",
    "optimization_barrier", "slice",
})  # fmt: skip
# These read their operands in another order, so that they cannot write over them.
_MOVING = frozenset({
    "dot_general", "conv_general_dilated", "transpose", "gather", "scatter", "scatter-add",
    "concatenate", "pad", "dynamic_slice", "rev", "sort", "pallas_call", "reduce_sum", "reduce_max",
})  # fmt: skip


def peak_bytes(trace: Any, split: Split = Split()) -> int:
    """Bytes of the values that a program makes, results included and arguments not.

    Args:
      trace: of jax.make_jaxpr, of arguments as one device holds them but for what `split` says.
    """
    return _peak(trace.jaxpr, split)


def product_bytes(trace: Any, split: Split = Split()) -> float:
    """Bytes that matrix products and kernels read and write: each operand and result once."""
    return _traffic(trace.jaxpr, split)


def _size(var: Any, split: Split) -> int:
    aval = var.aval
    if isinstance(var, Literal) or not hasattr(aval, "dtype"):
        return 0
    itemsize = getattr(aval.dtype, "itemsize", 8)  # a random key has none
    return math.prod(aval.shape) * itemsize // split.devices(tuple(aval.shape))


def _peak(jaxpr: Any, split: Split) -> int:
    """Peak of what the equations of `jaxpr` make, outputs included."""
    equations = needed_equations(jaxpr)
    roots, last = _lifetimes(equations, jaxpr.outvars)
    held: dict[Any, int] = {}
    now = peak = 0
    for index, equation in enumerate(equations):
        if equation.primitive.name in _VIEWS:
            continue
        made = {var: _size(var, split) for var in equation.outvars if var in last}
        inside = _inside(equation, split)
        if equation.primitive.name in _MOVING or inside:
            peak = max(peak, now + max(inside, sum(made.values())))
        ending = {roots.get(var, var) for var in equation.invars if not isinstance(var, Literal)}
        for var in ending & held.keys():
            if last[var] <= index:
                now -= held.pop(var)
        held |= made
        now += sum(made.values())
        peak = max(peak, now)
    return peak


def _lifetimes(equations: list[Any], outputs: list[Any]) -> tuple[dict, dict]:
    """{view: what it is a view of}, {value: index of the equation that reads it last}."""
    roots: dict[Any, Any] = {}
    last: dict[Any, int] = {}
    for index, equation in enumerate(equations):
        read = [var for var in equation.invars if not isinstance(var, Literal)]
        for var in read:
            last[roots.get(var, var)] = index
        if equation.primitive.name in _VIEWS and read:
            roots[equation.outvars[0]] = roots.get(read[0], read[0])
    for var in outputs:
        if not isinstance(var, Literal):
            last[roots.get(var, var)] = len(equations)
    return roots, last


def _inside(equation: Any, split: Split) -> int:
    """Peak while an equation runs, its results included; 0 for one without a program in it."""
    bodies = sub_programs(equation)
    if not bodies or equation.primitive.name == "pallas_call":
        return 0
    most = max(_peak(body, split.inside(equation)) for body in bodies)
    if equation.primitive.name == "scan":  # what it carries and stacks is there all the time
        most += sum(_size(var, split) for var in equation.outvars)
    return most


def _traffic(jaxpr: Any, split: Split) -> float:
    total = 0.0
    for equation in needed_equations(jaxpr):
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated", "pallas_call"):
            total += sum(_size(var, split) for var in (*equation.invars, *equation.outvars))
            continue
        inner = [_traffic(body, split.inside(equation)) for body in sub_programs(equation)]
        if name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            total += max(inner, default=0.0) if name == "cond" else sum(inner)
    return total
