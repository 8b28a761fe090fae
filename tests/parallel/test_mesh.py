"""Mesh shapes, who reads which rows, and global arrays."""

import jax
import numpy as np
import pytest
from fake_batches import bucket, micro, random_batch
from hypothesis import given
from hypothesis import strategies as st

from tpo_jax.parallel.mesh import (
    AXES,
    check_batch_divides,
    check_slices,
    global_batch,
    make_mesh,
    mesh_shape,
    reader_shard,
)

EIGHT = jax.devices()[:8]


@given(
    data=st.integers(1, 8), fsdp=st.integers(1, 4), tensor=st.integers(1, 4),
    wild=st.sampled_from(AXES),
)  # fmt: skip
def test_minus_one_takes_what_is_left(data, fsdp, tensor, wild):
    sizes = {"data": data, "fsdp": fsdp, "context": 1, "tensor": tensor}
    total = data * fsdp * tensor
    assert mesh_shape(sizes | {wild: -1}, total) == sizes


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"data": 3}, 8, "holds 3 devices.*there are 8"),
        ({"data": -1, "fsdp": 3}, 8, "holds 3 devices"),
        ({"data": -1, "fsdp": -1}, 8, "mesh.data=-1.*at most one is -1"),
        ({"fsdp": 0}, 8, "mesh.fsdp=0"),
        ({"model": 2}, 8, "mesh.model: unknown axis"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(sizes, devices)


def test_axes_are_auto():
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 2}, EIGHT)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == (2, 2, 1, 2)
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_only_data_may_span_slices():
    check_slices(mesh_shape({"data": 4, "fsdp": 2}, 8), 2)
    with pytest.raises(ValueError, match="mesh.data=1 does not divide over 2 slices.*multiple of"):
        check_slices(mesh_shape({"data": 1, "fsdp": 8}, 8), 2)


def test_global_batch_holds_the_rows_in_order():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, EIGHT)
    local = random_batch(bucket(8), micro())
    batch = global_batch(local, mesh)
    jax.tree.map(np.testing.assert_array_equal, batch, local)
    for leaf in jax.tree.leaves(batch):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


def test_rows_that_do_not_divide_are_named():
    mesh = make_mesh({"data": 8}, EIGHT)
    with pytest.raises(ValueError, match=r"batch/slots/x: 6 rows.*data=8.*multiple of 8"):
        check_batch_divides({"slots": {"x": np.zeros((6, 2))}}, mesh)
    with pytest.raises(ValueError, match="accumulation=2.*multiple of 16"):
        check_batch_divides({"a": np.zeros(8)}, mesh, accumulation=2)


@pytest.mark.parametrize(
    ("sizes", "per_process", "wanted"),
    [
        ({"data": 4}, 2, [(0, 2), (1, 2)]),  # two hosts, each its half
        ({"data": 2, "tensor": 2}, 1, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor spans hosts
        ({"tensor": 4}, 2, [(0, 1), (0, 1)]),  # every host holds every row
        ({"data": 2, "fsdp": 2}, 4, [(0, 1)]),
    ],
)
def test_every_process_reads_the_rows_that_its_devices_hold(
    monkeypatch, sizes, per_process, wanted
):
    mesh = make_mesh(sizes, jax.devices()[:4])
    processes = {device: device.id // per_process for device in mesh.devices.flat}
    for process, expected in enumerate(wanted):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert reader_shard(mesh, process_of=processes.__getitem__) == expected


def test_rows_shared_in_part_are_refused():
    mesh = make_mesh({"data": 3}, jax.devices()[:3])
    processes = {0: 0, 1: 0, 2: 1}
    with pytest.raises(ValueError, match="share some but not all rows"):
        reader_shard(mesh, process_of=lambda device: processes[device.id])
