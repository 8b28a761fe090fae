"""Checkpoints under gs://: Orbax and tensorstore as they are, the bucket in memory."""

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints, DamagedCheckpoint
from tpo_jax.training.save_policy import Save, SavePolicy

REGULAR = Save(("step",))


def test_a_bucket_holds_the_whole_unit(monkeypatch):
    rows = jax.NamedSharding(make_mesh({"data": 2, "fsdp": 4}), jax.P("fsdp"))
    make = jax.jit(lambda n: {"w": jnp.arange(8192.0).reshape(64, 128) + n}, out_shardings=rows)
    want = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)}
    policy = SavePolicy(every=1, keep=2)
    asked = gcs_server.install(monkeypatch)
    directory = epath.Path("gs://bucket/run/checkpoints")
    checkpoints = Checkpoints(directory, policy)
    for step in (1, 2, 3):
        unit = Checkpoint(make(step), {"next_index": step}, {}, {}, {}, {})
        checkpoints.save(step, unit, REGULAR)
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]
    assert any(line.startswith("POST ") and "ocdbt" in line for line in asked)

    again = Checkpoints(directory, policy)
    assert again.latest() == 3
    got = again.restore(3, want)
    np.testing.assert_array_equal(got.state["w"], make(3)["w"])
    assert (got.data, got.state["w"].sharding) == ({"next_index": 3}, rows)

    assert again.set_aside_after(2) == [3] and again.steps() == [2]
    (directory / "3.set_aside").rename(directory / "3")  # back again
    assert again.steps() == [2, 3]

    file = next(path for path in (directory / "3/state/ocdbt.process_0/d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpoint, match="another checksum"):
        Checkpoints(directory, policy).restore(3, want)

    # Cut off before its checksums: no checkpoint, and gone at the next start.
    (directory / "3/checksums_0.json").unlink()
    again = Checkpoints(directory, policy)
    assert again.steps() == [2] and not (directory / "3").exists()
    np.testing.assert_array_equal(again.restore(2, want).state["w"], make(2)["w"])
