import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training import local_checkpoints
from tpo_jax.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.save_policy import Save, SavePolicy
from tpo_jax.training.state import TrainState

LOCAL, BOTH = Save(("local",)), Save(("step", "local"))


def make_state(seed: int, mesh) -> TrainState:
    """Leaves that are split, split over two axes, whole on every device, and numbers."""
    put = {"kernel": jax.P("fsdp", "tensor"), "bias": jax.P(), "table": jax.P(None, "fsdp")}
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (8, 4)),
        "bias": -jnp.zeros(4),  # of which the sign is lost in a sum with zeros
        "table": jax.random.normal(keys[2], (3, 8), jnp.bfloat16),
    }
    params = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, put[name]))
        for name, leaf in params.items()
    }
    whole = jax.NamedSharding(mesh, jax.P())
    return TrainState(
        jax.device_put(jnp.int32(seed), whole), params, (jax.tree.map(lambda x: x * 2, params), ())
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def unit(step: int, mesh) -> Checkpoint:
    parts = ({"next_index": step}, {"best": None}, {"seconds": {"step": 1.5}}, {"seed": 0}, {})
    return Checkpoint(make_state(step, mesh), *parts)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture
def opened(tmp_path, mesh):
    """Opens the two tiers of the run in tmp_path/run; `.said` is what was told."""

    def open_run(workdir="run", on=mesh):
        opened.said = []
        (tmp_path / workdir).mkdir(exist_ok=True)
        local = LocalCheckpoints(
            tmp_path / "local", epath.Path(tmp_path / workdir), abstract(make_state(0, on)),
            opened.said.append,
        )  # fmt: skip
        policy = SavePolicy(every=4, keep=2, local_dir="local", local_every=1)
        return Checkpoints(tmp_path / workdir / "checkpoints", policy, local)

    opened = open_run
    return opened


def folder_of(tmp_path, step):
    (found,) = (tmp_path / "local").glob(f"*/process_0/{step}")
    return found


def test_the_whole_unit_comes_back_from_the_newest_of_both_tiers(tmp_path, opened, mesh):
    checkpoints = opened()
    assert checkpoints.latest() is None
    for step in range(1, 8):
        checkpoints.save(step, unit(step, mesh), BOTH if step == 4 else LOCAL)
    checkpoints.close()
    assert checkpoints.steps() == [4]
    kept = sorted(int(path.name) for path in folder_of(tmp_path, 7).parent.iterdir())
    assert kept == [5, 6, 7]

    again = opened()
    assert again.latest() == 7
    assert opened.said == ["going on from the local checkpoint of step 7"]
    want, put = abstract(make_state(0, mesh)), unit(7, mesh)
    again.check(7, want)
    got = again.restore(7, want)
    assert jax.tree.structure(got.state) == jax.tree.structure(put.state)
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(put.state), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (got.data, got.progress, got.ledger) == (put.data, put.progress, put.ledger)
    assert got.config == put.config

    # From a step of the workdir on purpose: the newer ones of the host must not come back.
    assert again.set_aside_after(4) == []
    assert opened().latest() == 4


def test_damage_gives_the_one_before_and_then_the_workdirs(tmp_path, opened, mesh):
    checkpoints = opened()
    for step in range(4, 7):
        checkpoints.save(step, unit(step, mesh), BOTH if step == 4 else LOCAL)
    checkpoints.close()
    for step, name in ((6, "state.safetensors"), (5, "run.json")):
        content = bytearray((folder_of(tmp_path, step) / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder_of(tmp_path, step) / name).write_bytes(content)
        checkpoints = opened()
        assert checkpoints.latest() == step - 1
        assert f"local checkpoint of step {step}:" in opened.said[-2]
        assert f"process 0: damaged since it was written: {name}" in opened.said[-2]
    (folder_of(tmp_path, 4) / "checksums_0.json").unlink()
    checkpoints = opened()
    assert checkpoints.latest() == 4 and checkpoints.read(4).data == {"next_index": 4}
    assert opened.said[-1].startswith("no local checkpoint can be used that is as new")
    # What could not be used goes with the next save.
    checkpoints.save(5, unit(5, mesh), LOCAL)
    checkpoints.close()
    assert [path.name for path in folder_of(tmp_path, 5).parent.iterdir()] == ["5"]


def test_another_mesh_or_another_run_does_not_take_it(tmp_path, opened, mesh):
    checkpoints = opened()
    checkpoints.save(4, unit(4, mesh), BOTH)
    checkpoints.save(5, unit(5, mesh), LOCAL)
    checkpoints.close()
    other = make_mesh({"data": 4, "fsdp": 2})
    assert opened(on=other).latest() == 4
    assert "process 0: was written for another mesh" in opened.said[0]
    assert opened(workdir="another").latest() is None
    (tmp_path / "run/run_id").unlink()  # as if the workdir had been emptied
    assert opened().latest() == 4


def test_a_save_that_was_cut_off_is_none_and_a_failed_one_is_told(tmp_path, opened, mesh):
    checkpoints = opened()
    checkpoints.save(1, unit(1, mesh), LOCAL)
    checkpoints.close()
    folder = folder_of(tmp_path, 1)
    folder.rename(folder.with_name("2.tmp"))
    again = opened()
    assert again.latest() is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**8, hard))  # as if the disk were full
    try:
        with pytest.raises(CheckpointError, match=r"process_0: a save failed"):
            again.save(3, unit(3, mesh), LOCAL)
            again.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert opened().latest() is None


def test_a_save_copies_beside_the_loop_and_the_update_waits(opened, mesh, monkeypatch):
    """`save` returns before the copy; what is donated after the wait has been copied."""
    let, real = threading.Event(), local_checkpoints._to_host

    def slow(part):
        assert let.wait(60)
        return real(part)

    monkeypatch.setattr(local_checkpoints, "_to_host", slow)
    donate = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints, state = opened(), unit(1, mesh)
    checkpoints.save(1, state, LOCAL)
    assert checkpoints.is_copying
    threading.Timer(0.2, let.set).start()
    checkpoints.wait_for_copy()
    assert let.is_set() and not checkpoints.is_copying
    jax.block_until_ready(donate(state.state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.state))
    checkpoints.close()
    again = opened()
    assert again.latest() == 1
    got, put = again.restore(1, abstract(make_state(0, mesh))).state, make_state(1, mesh)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(put), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    # Without the wait: an error, and never the values of the next step.
    let.clear()
    state = unit(2, mesh)
    again.save(2, state, LOCAL)
    donate(state.state)
    let.set()
    with pytest.raises(CheckpointError, match="(?s)a save failed: .*deleted"):
        again.close()
    assert opened().latest() == 1
