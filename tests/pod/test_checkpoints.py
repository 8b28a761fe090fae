"""Two processes (gloo) write one checkpoint; each answers for the files that it wrote."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import processes

from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.checkpoint import Checkpoints
from tpo_jax.training.save_policy import SavePolicy

# Saves steps 1 to 3, of which two stay; damages a file of process 1; says what restoring says.
PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint
from tpo_jax.training.save_policy import Save, SavePolicy

folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
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
"""


def test_two_processes_write_a_checkpoint_that_one_reads(tmp_path):
    said = processes.run_two(PROGRAM, tmp_path)
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
