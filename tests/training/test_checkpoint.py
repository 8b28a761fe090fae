import json
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tpo_jax.parallel.mesh import make_mesh, replicated
from tpo_jax.training import checksums
from tpo_jax.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    check,
)
from tpo_jax.training.resume import find_start, read_checkpoint
from tpo_jax.training.save_policy import Save, SavePolicy
from tpo_jax.training.state import TrainState

REGULAR = Save(("step",))


def policy(**options) -> SavePolicy:
    return SavePolicy(**{"every": 1, "keep": 1} | options)


def make_state(seed: int, size: int = 8) -> TrainState:
    w = jax.random.normal(jax.random.key(seed), (size, 4))
    params = {"vision": {"kernel": w, "bias": w[0]}, "heads": {"scale": jnp.float32(seed)}}
    moments = ({"mu": {"vision": {"kernel": w * 2}}, "count": jnp.int32(seed)}, ())
    return TrainState(jnp.int32(seed), params, moments)


def unit(seed: int, **changes) -> Checkpoint:
    parts = {
        "state": make_state(seed),
        "data": {"next_step": seed},
        "progress": {"best": None},
        "ledger": {"seconds": {"step": 1.5}},
        "config": {"seed": 0, "trainable": [[".*", 0.1]]},
        "identity": {"code": "0.1.0+abc"},
    }
    return Checkpoint(**parts | changes)


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_relative_directory_is_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints", policy(keep=1))
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    assert Checkpoints(tmp_path / "run" / "checkpoints", policy(keep=1)).latest() == 1


def test_a_bucket_directory_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # which writes nothing
    assert str(Checkpoints("gs://bucket/run", policy(keep=1)).directory) == "gs://bucket/run"


def test_the_whole_unit_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", policy(keep=2))
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, unit(step), REGULAR)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", policy(keep=2))
    assert again.steps() == [2, 3] and again.latest() == 3
    for step in (2, 3):
        got, put = again.restore(step, abstract(make_state(0))), unit(step)
        assert_equal(got.state, put.state)
        assert (got.data, got.progress) == (put.data, put.progress)
        assert (got.ledger, got.config, got.identity) == (put.ledger, put.config, put.identity)


def test_restores_onto_another_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy(keep=1))
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    want = abstract(make_state(0), replicated(mesh))
    want.params["vision"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)
    got = checkpoints.restore(1, want).state
    assert_equal(got, make_state(1))
    assert got.params["vision"]["kernel"].sharding == rows


def test_donating_the_state_right_after_save_does_not_change_what_is_written(tmp_path):
    state = jax.jit(lambda: {"w": jnp.full((512, 1024), 1.0)})()
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, policy(keep=1))
    checkpoints.save(1, unit(1, state=state), REGULAR)
    for _ in range(5):
        state = overwrite(state)
    jax.block_until_ready(state)
    checkpoints.close()
    got = checkpoints.restore(1, abstract(state)).state
    np.testing.assert_array_equal(got["w"], 1.0)


def test_wrong_structure_names_every_leaf(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy(keep=1))
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    want = abstract(make_state(0, size=16))
    want.params["heads"]["region"] = want.params["heads"].pop("scale")
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(1, want)
    message = str(error.value)
    assert "params/heads/region: not in the checkpoint" in message
    assert "params/heads/scale: in the checkpoint only" in message
    assert "params/vision/kernel: checkpoint has float32[8, 4]" in message
    assert "opt_state/0/mu/vision/kernel" in message
    assert "params/vision/bias" not in message


def test_partial_restore_takes_what_it_is_told_to(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy())
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    want = abstract(make_state(0))
    want.params["heads"]["region"] = want.params["heads"].pop("scale")
    for allowed, named, unnamed in (
        ({"missing": ["params/heads/"]}, "heads/scale: in the checkpoint only", "heads/region"),
        ({"extra": ["params/heads/"]}, "heads/region: not in the checkpoint", "heads/scale"),
    ):
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(1, want, **allowed)
        assert named in str(error.value) and unnamed not in str(error.value)
    got = checkpoints.restore(1, want, missing=["params/heads/"], extra=["params/heads/"]).state
    put = make_state(1)
    assert got.params["heads"] == {"region": want.params["heads"]["region"]}  # for us to fill
    assert_equal(got.params["vision"], put.params["vision"])
    assert_equal(got.opt_state, put.opt_state)


def test_another_dtype_is_converted_when_told_to(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy())
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    want = abstract(make_state(0))
    half = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding)
    want.params["vision"]["kernel"] = half
    with pytest.raises(CheckpointError, match=r"vision/kernel: checkpoint has float32\[8, 4\]"):
        checkpoints.restore(1, want)
    got = checkpoints.restore(1, want, cast=True).state.params["vision"]["kernel"]
    assert got.sharding == sharding and got.dtype == jnp.bfloat16
    expected = make_state(1).params["vision"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, expected)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    checkpoints = Checkpoints(directory, policy(keep=2))
    for step in (1, 2):
        checkpoints.save(step, unit(step), REGULAR)
        checkpoints.close()
    return directory


def test_a_flipped_bit_or_a_missing_end_is_found_in_every_file(two_steps, tmp_path):
    random = np.random.default_rng(0)
    names = list(checksums.files(epath.Path(two_steps / "2")))
    assert {"state/manifest.ocdbt", "run/data.json"} < set(names)
    for name in names:
        content = (two_steps / "2" / name).read_bytes()
        if not content:
            continue
        flipped, at = bytearray(content), int(random.integers(len(content)))
        flipped[at] ^= 1 << int(random.integers(8))
        for damaged in (bytes(flipped), content[:at]):
            directory = tmp_path / "damaged"
            shutil.copytree(two_steps, directory)
            (directory / "2" / name).write_bytes(damaged)
            checkpoints = Checkpoints(directory, policy(keep=2))
            assert checkpoints.latest() == 2
            with pytest.raises(DamagedCheckpoint, match=f"{name}: another"):
                checkpoints.restore(2, abstract(make_state(0)))
            assert checkpoints.newest_good(2) == 1
            shutil.rmtree(directory)


def test_damage_is_refused_with_the_step_to_go_on_from(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2/run/data.json").unlink()
    checkpoints = Checkpoints(tmp_path, policy(keep=2))
    with pytest.raises(DamagedCheckpoint, match="run/data.json: missing(.|\n)*--resume_from=1 "):
        read_checkpoint(checkpoints, find_start(checkpoints, None))
    assert find_start(checkpoints, 1) == 1 and read_checkpoint(checkpoints, 1).data
    assert checkpoints.set_aside_after(1) == [2]
    assert checkpoints.steps() == [1] and (tmp_path / "2.set_aside").exists()
    with pytest.raises(CheckpointError, match=r"--resume_from=2: .* there are \[1\]"):
        find_start(checkpoints, 2)


def test_a_removal_or_save_that_was_cut_off_is_no_checkpoint(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2/checksums_0.json").unlink()  # killed before these were written
    (tmp_path / "1").rename(tmp_path / "1.removed")
    checkpoints = Checkpoints(tmp_path, policy(keep=2))
    assert checkpoints.latest() is None and list(tmp_path.iterdir()) == []


def test_a_step_that_another_process_removes_meanwhile_is_no_checkpoint(
    two_steps, tmp_path, monkeypatch
):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    checkpoints, read = Checkpoints(tmp_path, policy(keep=2)), checksums._read

    def removed_first(path: epath.Path) -> dict:
        if path.parent.name == "1":
            shutil.rmtree(path.parent)
        return read(path)

    monkeypatch.setattr(checksums, "_read", removed_first)
    assert checkpoints.steps() == [2]


def test_looking_changes_nothing(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a run is writing it
    (tmp_path / "3.removed").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert check(tmp_path, abstract(make_state(0))) == (2, unit(2).config)
    with pytest.raises(CheckpointError, match="params/vision/kernel: checkpoint has"):
        check(tmp_path, abstract(make_state(0, size=16)))
    assert sorted(tmp_path.rglob("*")) == before
    assert check(tmp_path / "nothing", {}) is None and not (tmp_path / "nothing").exists()


def test_a_full_disk_names_the_checkpoints_that_are_left(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy(keep=2))
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.wait()
    noise = jax.random.normal(jax.random.key(0), (256, 256))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))  # as if it were full
    try:
        with pytest.raises(CheckpointError, match=r"a save failed(.|\n)*the steps \[1\]"):
            checkpoints.save(2, unit(2, state={"w": noise}), REGULAR)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path, policy(keep=2))
    assert again.latest() == 1
    again.save(2, unit(2), REGULAR)
    again.close()
    assert again.latest() == 2


def test_what_the_policy_keeps_survives_reopening(tmp_path):
    saves = {1: Save(("step", "permanent")), 2: Save(("step", "best"), 0.5),
             3: Save(("best",), 0.7), 4: Save(("step",)), 5: Save(("time",)),
             6: Save(("preemption",))}  # fmt: skip
    for step, save in saves.items():
        checkpoints = Checkpoints(tmp_path, policy(keep=1, best=1))
        checkpoints.save(step, unit(step), save)
        checkpoints.close()
    assert checkpoints.steps() == [1, 2, 4, 6]


def test_another_format_version_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy(keep=1))
    checkpoints.save(1, unit(1), REGULAR)
    checkpoints.close()
    run = tmp_path / "1/run/data.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"format_version": 99}))
    checksums.write(epath.Path(tmp_path / "1"), 0, 1)
    with pytest.raises(CheckpointError, match="format version 99"):
        checkpoints.restore(1, abstract(make_state(0)))


def test_a_part_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, policy(keep=1))
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, unit(1, data={"next_step": object()}), REGULAR)
    assert list(tmp_path.iterdir()) == []


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="checkpoint.keep=0"):
        Checkpoints(tmp_path, policy(keep=0))


KILLED = """
import os, signal, sys, threading
import jax.numpy as jnp
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.resume import find_start, read_checkpoint
from tpo_jax.training.save_policy import Save, SavePolicy

REGULAR = Save(("step",))

def unit(step, rows):
    state = {"w": jnp.full((rows, 1024), float(step))}
    return Checkpoint(state, {"next_step": step}, {}, {}, {}, {})

checkpoints = Checkpoints(sys.argv[1], SavePolicy(every=1, keep=3))
checkpoints.save(1, unit(1, 8), REGULAR)
checkpoints.wait()
delay = float(sys.argv[2])
if delay:  # somewhere in the write, or just after it
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
checkpoints.save(2, unit(2, 8192), REGULAR)  # 32 MiB
if not delay:
    while not list(checkpoints.directory.glob("2.orbax-checkpoint-tmp*")):
        pass  # the background thread is about to create it
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.wait()
threading.Event().wait()
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2])
def test_kill_9_during_a_save_leaves_the_last_good_checkpoint(tmp_path, delay):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(delay)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    if not delay:
        assert list(tmp_path.glob("2.orbax-checkpoint-tmp*")), "the save was over before the kill"
    checkpoints = Checkpoints(tmp_path, policy(keep=3))
    step = checkpoints.latest()
    assert step == 1 if not delay else step in (1, 2)
    rows = {1: 8, 2: 8192}[step]
    want = abstract({"w": jnp.zeros((rows, 1024))})
    got = checkpoints.restore(step, want)
    np.testing.assert_array_equal(got.state["w"], float(step))
    assert got.data == {"next_step": step}
    assert {p.name for p in tmp_path.iterdir()} == {str(s) for s in checkpoints.steps()}
    # The step that was cut off can be written again.
    if step == 1:
        checkpoints.save(2, unit(2), REGULAR)
        checkpoints.close()
        assert checkpoints.latest() == 2
