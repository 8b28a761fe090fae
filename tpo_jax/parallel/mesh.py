"""Device meshes, and global batches assembled from what each process read.

Axes, outermost (slowest network) first:
  data     copies of the model; rows of the batch are split over it
  fsdp     rows of the batch *and* parameters are split over it
  context  prefixes and frames of a row are split over it (parallel.context); batches are not
  tensor   attention heads and hidden units are split over it

Several TPU slices are joined by the data centre network, which is slow: they hold copies of the
model, so data is a multiple of their number and every other axis lies within a slice.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tpo_jax.errors import UserError
from tpo_jax.parallel.paths import flatten

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")


def mesh_of_devices(sizes: Mapping[str, int]) -> Mesh:
    """`make_mesh` over as many devices as `sizes` say, the first ones; over all of them where a
    size is -1, or where other processes, whose devices have to be in it, have joined."""
    devices = jax.devices()
    whole = -1 in sizes.values() or jax.process_count() > 1
    return make_mesh(sizes, devices if whole else devices[: math.prod(sizes.values())])


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Fills the one axis of size -1 and checks that the product is `num_devices`.

    Raises:
      ValueError: an unknown axis, two axes of -1, a size below 1, or a product that does not fit.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(f"mesh.{unknown[0]}: unknown axis; the axes are {', '.join(AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    wild = [axis for axis, size in shape.items() if size == -1]
    bad = [axis for axis, size in shape.items() if size < 1 and size != -1]
    if bad or len(wild) > 1:
        axis = (bad or wild)[0]
        raise UserError(
            f"mesh.{axis}={shape[axis]}: each axis is a positive number, and at most one is -1 "
            f"(takes what is left); got {shape}"
        )
    known = int(np.prod([size for size in shape.values() if size != -1]))
    if wild and num_devices % known == 0:
        shape[wild[0]] = num_devices // known
    if int(np.prod(list(shape.values()))) != num_devices:
        raise UserError(
            f"mesh {shape} holds {abs(known)} devices (without -1), but there are {num_devices}; "
            "change the sizes under config.mesh, or give one axis -1"
        )
    return shape


def describe_shape(mesh: Mesh | AbstractMesh) -> str:
    """Such as "data 1, fsdp 8, context 1, tensor 1"."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, context, tensor) over `devices` (default: all of them).

    `sizes` is config.mesh; axes left out have size 1. Axis types are Auto: the compiler places
    what the rules leave open.

    Raises:
      ValueError: sizes that do not fit the devices, or data that does not divide over their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = num_slices(devices)
    if slices == 1:
        return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=devices)
    check_slices(shape, slices)
    within = (shape["data"] // slices, *tuple(shape.values())[1:])
    between = (slices, *(1,) * (len(AXES) - 1))
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=types)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Slices of a TPU pod that the devices belong to; 1 for all other devices."""
    # Devices of a topology of one slice have no slice_index; on GPUs it numbers hosts.
    if devices[0].platform != "tpu" or not hasattr(devices[0], "slice_index"):
        return 1
    return len({device.slice_index for device in devices})


def check_slices(shape: Mapping[str, int], slices: int) -> None:
    """Raises where the mesh would split parameters or heads over the data centre network."""
    if shape["data"] % slices:
        raise UserError(
            f"mesh.data={shape['data']} does not divide over {slices} slices, so that another axis "
            f"of {dict(shape)} would span them; make mesh.data a multiple of {slices}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (dimension 0) over data and fsdp, everything else whole. Serves every batch leaf."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_devices() -> int:
    """Devices that rows are split over in the mesh around the call, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, traced where jax.sharding.get_abstract_mesh() is `mesh`.

    Modules carry no mesh; what has to know it (a kernel under shard_map, `rules.constrain_rows`)
    asks for the one around it.
    """

    @functools.wraps(function)
    def traced(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return traced


def check_batch_divides(batch: Any, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises if the rows of a global batch leaf do not divide over the mesh.

    Args:
      batch: nested dict of arrays or ShapeDtypeStructs with *global* leading dimension.
      accumulation: micro-batches a step; each must hold the same number of rows on every device.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    for path, leaf in flatten(batch).items():
        rows = leaf.shape[0] if leaf.shape else 0
        if not rows or rows % (parts * accumulation):
            raise UserError(
                f"batch/{path}: {rows} rows (shape {tuple(leaf.shape)}) do not divide over "
                f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices "
                f"x accumulation={accumulation}; make the bucket's batch_size a multiple of "
                f"{parts * accumulation}"
            )


def reader_shard(
    mesh: Mesh,
    process_of: Callable[[jax.Device], int] = operator.attrgetter("process_index"),
) -> tuple[int, int]:
    """(index, count) of the slice of every global batch that this process reads.

    Processes that hold the same rows (a tensor axis that spans hosts) read the same slice, so
    `count` can be below jax.process_count(). Pass both to data.pipeline.Pipeline.

    Raises:
      ValueError: processes whose rows overlap in part, or that hold unequal numbers of rows.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    blocks: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        blocks.setdefault(process_of(device), set()).add(rows.indices(parts)[0])
    slices = sorted({tuple(sorted(rows)) for rows in blocks.values()})
    flat = [row for rows in slices for row in rows]
    if len(flat) != len(set(flat)) or len({len(rows) for rows in slices}) != 1:
        raise UserError(
            f"mesh {dict(mesh.shape)}: processes share some but not all rows of a batch "
            f"({slices}); choose sizes so that data x fsdp is a multiple or a divisor of the "
            "process count"
        )
    return slices.index(tuple(sorted(blocks[jax.process_index()]))), len(slices)


def global_batch(local: Any, mesh: Mesh) -> Any:
    """Global arrays from the rows that this process read.

    Args:
      local: nested dict of numpy arrays [B/count, ...], slice `index` of `reader_shard(mesh)`.

    Returns:
      the same nest of jax.Array [B, ...], rows sharded over (data, fsdp).
    """
    _, count = reader_shard(mesh)
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype), local
    )
    check_batch_divides(whole, mesh)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x, g: jax.make_array_from_process_local_data(sharding, np.asarray(x), g.shape),
        local,
        whole,
    )
