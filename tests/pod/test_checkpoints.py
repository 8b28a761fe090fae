"""Two processes (gloo) write one checkpoint; each answers for the files that it wrote. And they
read one model, each its own bytes of it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.checkpoint import Checkpoints
from tpo_jax.training.save_policy import SavePolicy

# Saves steps 1 to 3, of which two stay; damages a file of process 1; says what restoring says.
# Then reads a model as training does, and says where and how many bytes.
PROGRAM = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from tpo_jax.interop import folder as models, tensors
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import unflatten
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint
from tpo_jax.training.save_policy import Save, SavePolicy

folder, model, port, index = *map(pathlib.Path, sys.argv[1:3]), sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, index)
rows = jax.NamedSharding(make_mesh({"fsdp": 2}), jax.P("fsdp"))
make = jax.jit(lambda n: {"w": jnp.arange(8192.0).reshape(64, 128) + n}, out_shardings=rows)
checkpoints = Checkpoints(folder, SavePolicy(every=1, keep=2))
for step in (1, 2, 3):
    unit = Checkpoint(make(step), {"next_index": step}, {}, {}, {}, {})
    checkpoints.save(step, unit, Save(("step",)))
checkpoints.close()
multihost_utils.sync_global_devices("saved")
if index == 0:
    assert checkpoints.steps() == [2, 3], checkpoints.steps()
    file = next((folder / "3/state/ocdbt.process_1/d").iterdir())
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
multihost_utils.sync_global_devices("damaged")
assert checkpoints.latest() == 3
try:
    checkpoints.read(3)
except DamagedCheckpoint as error:
    print(error, flush=True)
want = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)}
got = checkpoints.restore(2, want)
assert (got.data, got.state["w"].sharding) == ({"next_index": 2}, rows)

leaves = {name: np.asarray(leaf) for name, leaf in models.open_leaves(model).items()}
abstract = unflatten(
    {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()})
wanted = jax.tree.map(
    lambda x, put: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put),
    abstract, param_shardings(abstract, make_mesh({"fsdp": 2})))
read, fill = [], tensors._fill_run
def counted(out, stream, start):
    read.append((start, out.nbytes))
    fill(out, stream, start)
tensors._fill_run = counted
for name, leaf in models.load_into(wanted, model).leaves.items():
    (part,) = leaf.addressable_shards
    np.testing.assert_array_equal(part.data, leaves[name][part.index], err_msg=name)
print(json.dumps(read), flush=True)
"""
# Of 4 KiB a part and more along the columns of the file, which processes read apart.
LEAVES = {
    "language/layers/self_attn/q_proj/kernel": (2, 8, 64),  # rows are split
    "language/layers/mlp/down_proj/kernel": (2, 4, 2048),  # columns are
    "language/norm/scale": (64,),  # every process has it
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What either process said, and its folders: of checkpoints, and of a model."""
    path, model = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("model")
    leaves = {name: lazy(np.random.default_rng(0).normal(size=shape).astype(np.float32))
              for name, shape in LEAVES.items()}  # fmt: skip
    write_file(model / "model-00001-of-00001.safetensors", leaves, {"format": "tpo_jax"})
    return processes.run_two(PROGRAM, path, model), path, model


def test_each_of_two_processes_reads_its_own_bytes(ran):
    """Together all of them, and none twice but what both hold."""
    said, _, model = ran
    data = (model / "model-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    times = np.zeros((2, len(data)), int)
    for index, out in enumerate(said):
        for start, count in json.loads(out.splitlines()[-1]):
            times[index, start : start + count] += 1
    for name in LEAVES:
        first, last = header[name]["data_offsets"]
        of_leaf = times[:, 8 + length + first : 8 + length + last]
        both = name == "language/norm/scale"
        assert (of_leaf.sum(0) == 1 + both).all() and (of_leaf <= 1).all(), name
        share = 1 if both else 2
        assert (of_leaf.sum(1) == (last - first) // share).all(), name


def test_two_processes_write_a_checkpoint_that_one_reads(ran):
    said, tmp_path, _ = ran
    # Both refuse, though one of them has looked at the file.
    assert all(f"{tmp_path / '3'}: damaged since it was written" in out for out in said)
    assert any(re.search(r"process_1/d/\w+: another checksum", out) for out in said)
    owners = [json.loads((tmp_path / f"2/checksums_{i}.json").read_text()) for i in range(2)]
    assert [sums["processes"] for sums in owners] == [2, 2]
    assert any("process_1/d/" in name for name in owners[1]["files"])
    assert not owners[0]["files"].keys() & owners[1]["files"].keys()

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    columns = jax.NamedSharding(mesh, jax.P("tensor", "fsdp"))
    want = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=columns)}
    got = Checkpoints(tmp_path, SavePolicy(every=1, keep=2)).restore(2, want).state["w"]
    assert got.sharding == columns
    np.testing.assert_array_equal(got, np.arange(8192.0).reshape(64, 128) + 2)


def test_a_checkpoint_of_two_processes_is_complete_with_both(tmp_path):
    sums = json.dumps({"processes": 2, "files": {}})
    checkpoints = Checkpoints(tmp_path, SavePolicy(every=1, keep=1))
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "checksums_0.json").write_text(sums)
    assert checkpoints.steps() == []
    (folder / "checksums_1.json").write_text(sums)
    assert checkpoints.steps() == [7]
