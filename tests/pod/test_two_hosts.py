"""Two processes (gloo) keep checkpoints on their hosts, and lose them."""

import processes

# Along data either process can give the other what it lost; along fsdp nobody can.
PROGRAM = """
import pathlib, shutil, sys
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.save_policy import Save, SavePolicy

root, port, me = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, me)
LOCAL, BOTH = Save(("local",)), Save(("step", "local"))
policy = SavePolicy(every=4, keep=2, local_dir="local", local_every=1)

class Run:
    def __init__(self, axis):
        mesh = make_mesh({axis: 2})
        put = {"w": jax.NamedSharding(mesh, jax.P("fsdp")), "b": jax.NamedSharding(mesh, jax.P())}
        self.make = jax.jit(
            lambda n: {"w": jnp.sin(jnp.arange(8192.0) + n).reshape(64, 128), "b": -0.0 * n},
            out_shardings=put)
        state = jax.eval_shape(self.make, 1.0)
        self.want = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=put[k])
                     for k, v in state.items()}
        self.workdir, self.local = root / axis, root / axis / f"host{me}"
        self.workdir.mkdir(exist_ok=True)

    def open(self):
        self.said = []
        multihost_utils.sync_global_devices("before a start")
        local = LocalCheckpoints(
            self.local, epath.Path(self.workdir), self.want, self.said.append)
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", policy, local)

    def save(self, step, save):
        unit = Checkpoint(self.make(float(step)), {"next_index": step}, {}, {}, {}, {})
        self.checkpoints.save(step, unit, save)

    def goes_on_from(self, step):
        self.open()
        assert self.checkpoints.latest() == step, self.said
        got, put = self.checkpoints.restore(step, self.want), self.make(float(step))
        assert got.data == {"next_index": step}
        for name, leaf in put.items():
            a, b = (np.asarray(x.addressable_data(0)) for x in (got.state[name], leaf))
            assert a.tobytes() == b.tobytes() and got.state[name].sharding == leaf.sharding, name

    def file(self, step):
        (found,) = self.local.glob(f"*/process_{me}/{step}/state.safetensors")
        return found

    def damage(self, step):
        content = bytearray(self.file(step).read_bytes())
        content[-1] ^= 1
        self.file(step).write_bytes(content)

run = Run("data")
run.open()
for step in (4, 5, 6):
    run.save(step, BOTH if step == 4 else LOCAL)
run.checkpoints.close()
run.goes_on_from(6)
assert run.said == ["going on from the local checkpoint of step 6"], run.said
if me == 1:
    shutil.rmtree(run.local)
run.goes_on_from(6)
assert run.said[0].endswith("  process 1: has no files; taken from process 0"), run.said
if me == 0:
    run.damage(6)
run.goes_on_from(6)  # from the copy that process 1 has now
assert "process 0: damaged since it was written: state.safetensors: another" in run.said[0]
assert run.said[0].endswith("taken from process 1"), run.said
run.damage(6)
run.goes_on_from(5)  # which process 1 has no more
assert run.said[1].endswith("  process 1: has no files; taken from process 0"), run.said
print(run.said[0], flush=True)

run = Run("fsdp")
run.open()
for step in (4, 5, 6):
    run.save(step, BOTH if step == 4 else LOCAL)
run.checkpoints.close()
assert "w@32:64,0:128" in run.file(6).read_bytes()[:400].decode(errors="ignore") or me == 0
if me == 0:
    run.damage(6)
run.goes_on_from(5)
assert run.said[0].endswith("state.safetensors: another checksum; no other process has it")
run.save(6, LOCAL)
run.checkpoints.close()
run.goes_on_from(6)
if me == 1:
    shutil.rmtree(run.local)
run.goes_on_from(4)
assert "process 1: has no files; no other process has it" in run.said[0], run.said
assert run.said[-1] == "no local checkpoint can be used that is as new as the workdir's"
"""


def test_what_one_host_lost_comes_from_its_copy_or_the_workdir(tmp_path):
    for out in processes.run_two(PROGRAM, tmp_path):  # told the same, of whichever process
        assert all(f"process {i}: damaged since it was written" in out for i in range(2)), out
