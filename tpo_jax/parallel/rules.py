"""Which axis of which parameter is split: path regex -> PartitionSpec, the first match wins.

Modules carry no mesh. Patterns are anchored at the start of a "/"-joined parameter path. Kernels
are [in, out], or [L, in, out] in a scanned stack, where L is never split. `fsdp` splits parameters
that every device then gathers before use; `tensor` splits heads and hidden units (columns of the
first matmul of a block, rows of the second). Key/value heads are never split: there are few.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tpo_jax.errors import UserError
from tpo_jax.parallel.mesh import BATCH_AXES, row_devices
from tpo_jax.parallel.paths import first_match, flatten, map_with_path

Rules = Sequence[tuple[str, P]]

LARGE_LEAF_BYTES = 2**20

RULES: Rules = (
    # vocabulary, padded to a multiple of 128: table [V, D] and head [D, V]
    (r"language/embed/table$", P("tensor", "fsdp")),
    (r"language/lm_head/kernel$", P("fsdp", "tensor")),
    # stacked layers [L, in, out]
    (r"language/layers/.*(k_proj|v_proj)/kernel$", P(None, "fsdp", None)),
    (r"(language|vision|connector)/(.*/)?layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)"
     r"/kernel$", P(None, "fsdp", "tensor")),
    (r"(language|vision|connector)/(.*/)?layers/.*(o_proj|down_proj|fc2)/kernel$",
     P(None, "tensor", "fsdp")),
    # fused matrices of umt, those of the Q-Former: columns are not grouped by heads alone
    (r"(vision|connector)/(.*/)?layers/.*kernel$", P(None, "fsdp", None)),
    (r"(language|vision)/(.*/)?layers/.*lora_a$", P(None, "fsdp", None)),
    (r"(language|vision)/(.*/)?layers/.*lora_b$", P(None, None, "fsdp")),
    # a convolution as checkpoints store it, [out, 3, p, p], or siglip2's [pixels, out]
    (r"vision/(.*/)?patch_embedding/kernel$", P()),
    # stacked layers of SAM 2, [L, in, out]
    (r"heads/sam2/.*/(blocks|layers|fuser|mask_mlps)/(?!layer\d).*kernel$",
     P(None, "fsdp", None)),
    # single matrices [in, out]: stem (whose input is patch pixels), connector, box encoder, heads
    (r"vision/stem/.*kernel$", P(None, "fsdp")),
    (r".*fc1/kernel$", P("fsdp", "tensor")),
    (r".*fc2/kernel$", P("tensor", "fsdp")),
    (r".*(kernel|lora_a)$", P("fsdp", None)),
    (r".*lora_b$", P(None, "fsdp")),
    # vectors and position tables: read whole
    (r".*(scale|bias|position)$", P()),
    (r".*(position_embedding|class_embedding|temporal_embedding|query_tokens)$", P()),
    (r"connector/(image_newline|faster_token)$", P()),
    (r"task_tokens/", P()),
)  # fmt: skip


def partition_spec(path: str, leaf: Any, mesh: Mesh, rules: Rules = RULES) -> P:
    """The spec of one parameter.

    A dimension that does not divide stays whole in a leaf of at most 1 MiB.

    Args:
      leaf: array or ShapeDtypeStruct.

    Raises:
      ValueError: a leaf above 1 MiB that no rule matches, or a dimension of it that does not
        divide over its mesh axis; a rule with more dimensions than the leaf.
    """
    shape, size = tuple(leaf.shape), math.prod(leaf.shape) * leaf.dtype.itemsize
    index = first_match([pattern for pattern, _ in rules], path)
    if index is None:
        if size > LARGE_LEAF_BYTES and mesh.size > 1:
            raise UserError(
                f"params/{path}: shape {shape} ({size / 2**20:.1f} MiB) matches no sharding rule; "
                "add its path to RULES in tpo_jax/parallel/rules.py"
            )
        return P()
    pattern, spec = rules[index]
    if len(spec) > len(shape):
        raise UserError(f"params/{path}: rule {pattern!r} gives {spec} to the shape {shape}")
    kept = []
    for dimension, axis in enumerate(spec):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            if size > LARGE_LEAF_BYTES:
                raise UserError(
                    f"params/{path}: dimension {dimension} of {shape} does not divide over "
                    f"{axis}={mesh.shape[axis]} (rule {pattern!r}); change config.mesh.{axis} or "
                    "the rule"
                )
            axis = None
        kept.append(axis)
    return P(*kept)


def param_shardings(params: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """NamedSharding per leaf of nested params (arrays or ShapeDtypeStructs)."""
    return map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path, leaf, mesh, rules)), params
    )


def follow_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer state: a leaf whose path ends in a parameter's path, and that has
    its shape, is split like the parameter; anything else (step counts) is replicated."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    by_path = flatten(shardings)

    def place(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if shapes.get(tail) == tuple(leaf.shape):
                return by_path[tail]
        if math.prod(leaf.shape) * leaf.dtype.itemsize > LARGE_LEAF_BYTES and mesh.size > 1:
            raise UserError(
                f"opt_state/{path}: shape {tuple(leaf.shape)} is above 1 MiB and follows no "
                "parameter; its path must end in the path of the parameter that it belongs to"
            )
        return NamedSharding(mesh, P())

    return map_with_path(place, tree)


def describe(params: Any, shardings: Any) -> str:
    """A table for the log: path, shape, spec."""
    specs = flatten(shardings)
    rows = [(p, str(tuple(x.shape)), str(specs[p].spec)) for p, x in flatten(params).items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{p:<{widths[0]}}  {s:<{widths[1]}}  {spec}" for p, s, spec in rows)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Tells the compiler that dimension 0 of an activation [B, ...] holds batch rows, split over
    (data, fsdp), and that the rest is not split by it. Nothing happens outside a mesh, or to rows
    that do not divide."""
    if jax.sharding.get_abstract_mesh().empty or x.shape[0] % row_devices():
        return x
    open_rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *open_rest))


def constrain_cache(x: jax.Array) -> jax.Array:
    """Tells the compiler how keys or values of prefixes [L, B, P, G, H] are split: rows over (data,
    fsdp), tokens over context. Nothing happens outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(None, BATCH_AXES, "context"))


def constrain_lookup(x: jax.Array) -> jax.Array:
    """Tells the compiler how vectors are split that were looked up in a table [V, D]: rows over
    data, columns over fsdp like those of the table. x is float[B, ..., D].

    So each copy of the model adds up the gradient of its own table before copies are summed.
    Otherwise the compiler may gather the vectors' gradients of all rows, also over the slow network
    between slices. Nothing happens outside a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[-1] % mesh.shape["fsdp"]:
        return x
    middle = (P.UNCONSTRAINED,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, P("data", *middle, "fsdp"))


def place(tree: Any, shardings: Any) -> Any:
    """Puts a host pytree (the same on every process) onto the mesh."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index, x=x: x[index]),
        tree,
        shardings,
    )
