"""The train command on a model and data that take seconds, on one device in this process."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import unittest.mock

import gcs_server
import jax
import numpy as np
import pytest
import tiny_run
from etils import epath
from processes import QUICK

import tpo_jax.train
from tpo_jax import evaluate
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.evaluation import results
from tpo_jax.interop.export import export_model, import_model
from tpo_jax.interop.folder import ModelFolderError, load_model
from tpo_jax.parallel.mesh import global_batch, make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training import compiled, local_checkpoints
from tpo_jax.training.checkpoint import CheckpointError, Checkpoints
from tpo_jax.training.config import to_dict
from tpo_jax.training.config_flag import read_json
from tpo_jax.training.dry_run import DryRun
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import EXIT_STATUS, Preempted, Preemption
from tpo_jax.training.program import Program
from tpo_jax.training.start import make_model_config
from tpo_jax.training.writers import read_scalars

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def one_device_and_one_compilation():
    """Runs on one of the fake devices; runs with the same program share what is compiled."""
    shared, compile_buckets = {}, tpo_jax.train.compile_buckets

    def compile_once(program, builders, evaluate, say, preemption):
        shapes = str((program.abstract_state, [b.bucket for b in builders.values()]))
        measured = program.task_gradients is not None
        key = (shapes, str(program.objective), program.optimizer.report, evaluate, measured)
        if key not in shared:
            shared[key] = compile_buckets(program, builders, evaluate, say, preemption)
        return shared[key]

    with pytest.MonkeyPatch.context() as patch:
        mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(tpo_jax.train, "make_mesh", mesh)
        patch.setattr(tpo_jax.train, "compile_buckets", compile_once)
        yield


def run(config, workdir, **options) -> int:
    with Preemption() as preemption:
        return tpo_jax.train.train(config, epath.Path(workdir), preemption, Ledger(), **options)


def metrics(workdir) -> list[dict]:
    """All records without the measured times."""
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_scalars(workdir / "metrics.jsonl")
    ]


def assert_same_model(a, b):
    (config_a, params_a, _), (config_b, params_b, _) = load_model(a), load_model(b)
    assert config_a == config_b
    assert flatten(params_a).keys() == flatten(params_b).keys()
    for path, leaf in flatten(params_a).items():
        np.testing.assert_array_equal(leaf, flatten(params_b)[path], err_msg=path)


def kill_at(monkeypatch, step: int) -> list[int]:
    """Sends this process a SIGTERM while it handles batch `step`; returns those it handled."""
    seen = []

    def send(local, mesh):
        seen.append(len(seen))
        if seen[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return global_batch(local, mesh)

    monkeypatch.setattr(tpo_jax.train, "global_batch", send)
    return seen


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run(tiny_run.get_config(f"data={data}"), workdir) == 0
    return workdir


def test_a_run_learns_and_leaves_everything_behind(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "tensorboard", "ledger.json", "checkpoints", "model",
        "best_model",
    }  # fmt: skip
    records = metrics(whole)
    train = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in train] == [2, 4, 6, 8, 10, 12]
    assert train[-1]["train/loss"] < 0.6 * train[0]["train/loss"]
    evaluated = [record for record in records if "validation/loss" in record]
    assert [record["step"] for record in evaluated] == [6, 12]
    ledger = json.loads((whole / "ledger.json").read_text())
    assert ledger["finished"] and ledger["restarts"] == 0 and ledger["seconds"]["step"] > 0
    best = min(evaluated, key=lambda record: record["validation/loss"])
    assert ledger["best"] == {"step": best["step"], "loss": best["validation/loss"]}
    if best["step"] == 12:
        assert_same_model(whole / "best_model", whole / "model")
    assert [int(p.name) for p in (whole / "checkpoints").iterdir()] in ([10, 12], [12, 10])


def test_the_end_of_a_run_says_what_its_two_models_are():
    progress = {"best": {"step": 75, "loss": 0.5}, "evaluated_loss": 0.75}
    assert tpo_jax.train.describe_models(100, progress) == (
        "model/: the last weights, step 100, validation loss 0.7500\n"
        "best_model/: those of the lowest validation loss, step 75, 0.5000"
    )


def test_examples_seen_are_those_of_the_plans(data, whole):
    """Counted on the device and here; the runs below are stopped, and still count the same."""
    config = tiny_run.get_config(f"data={data}")
    model_config, codec = make_model_config(config)
    plain = to_dict(config)
    pipeline = Pipeline(
        plain["data"]["train"], codec, model_config, (), plain["buckets"], config.seed
    )
    seen, expected = 0, {}
    for step in range(12):
        seen += sum(len(plan.branches) for plan in pipeline.plans(step)[2])
        expected[step + 1] = seen
    records = [record for record in metrics(whole) if "train/loss" in record]
    found = {record["step"]: record["train/examples/conversation"] for record in records}
    assert found == {step: expected[step] for step in (2, 4, 6, 8, 10, 12)}
    assert seen >= 4 * 12  # a row has one question at least
    for record in records:
        assert record["train/objective/language"] == pytest.approx(record["train/loss"], rel=1e-6)


def test_sizes_of_gradients_are_measured_when_they_are_due(data, tmp_path, capsys):
    config = tiny_run.get_config(f"data={data},steps=4,buckets=1")
    config.eval_every, config.log_every, config.task_gradients_every = 0, 1, 2
    assert run(config, tmp_path) == 0
    records = {record["step"]: record for record in metrics(tmp_path)}
    shares = {step: r.get("train/gradient_share/language") for step, r in records.items()}
    assert shares == {1: None, 2: 1.0, 3: None, 4: 1.0}
    for step in (2, 4):  # of one task, with the dropout of the step
        norm = records[step]["train/gradient_norm/language"]
        assert norm == pytest.approx(records[step]["train/grad_norm"], rel=1e-5)
    line = f"100.0% {data}/train: 6 videos, 2.7 epochs; conversation 100.0%"
    assert line in capsys.readouterr().err


# The counter runs over the two validation batches at step 6 as well: 6 is the first of them, 3 is
# in the middle of a logging window, 2 in the third run is the step after the repeated validation.
@pytest.mark.parametrize("steps", [(3,), (6,), (0, 4, 2)])
def test_sigterm_saves_exits_with_75_and_continues_bit_identically(
    data, whole, tmp_path, monkeypatch, steps
):
    config = tiny_run.get_config(f"data={data}")
    for step in steps:
        with monkeypatch.context() as patch:
            handled = kill_at(patch, step)
            assert run(config, tmp_path) == EXIT_STATUS
        assert handled[-1] == step  # the last one, of validation as of training
        assert not (tmp_path / "model").exists()
    assert run(config, tmp_path) == 0
    assert metrics(tmp_path) == metrics(whole)
    assert_same_model(tmp_path / "model", whole / "model")
    assert_same_model(tmp_path / "best_model", whole / "best_model")
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["restarts"] == len(steps)


def test_a_restart_reads_the_state_while_it_compiles(data, whole, tmp_path, monkeypatch):
    """Both wait for each other, which only those can who run at the same time."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    both = threading.Barrier(2, timeout=60)
    restore, compile_once = Checkpoints.restore, tpo_jax.train.compile_buckets

    def meet(function):
        def call(*args, **options):
            both.wait()
            return function(*args, **options)

        return call

    monkeypatch.setattr(Checkpoints, "restore", meet(restore))
    monkeypatch.setattr(tpo_jax.train, "compile_buckets", meet(compile_once))
    assert run(tiny_run.get_config(f"data={data}"), tmp_path, resume_from=10) == 0
    assert not both.broken and both.n_waiting == 0
    assert metrics(tmp_path) == metrics(whole)


def test_resuming_with_another_config_names_the_option(data, whole):
    config = tiny_run.get_config(f"data={data}")
    config.trainable = [[".*", 1e-4]]
    config.log_every = 1  # may change
    with pytest.raises(CheckpointError) as error:
        run(config, whole)
    assert "trainable[0][1]: checkpoint has 0.003, this command has 0.0001" in str(error.value)
    assert "log_every" not in str(error.value)


@pytest.mark.parametrize("devices", [1, 2])
def test_resuming_on_another_mesh_says_so(data, whole, devices, monkeypatch, capsys):
    mesh = functools.partial(make_mesh, devices=jax.devices()[:devices])
    monkeypatch.setattr(tpo_jax.train, "make_mesh", mesh)
    stop = unittest.mock.Mock(side_effect=Preempted)  # before anything is compiled
    monkeypatch.setattr(tpo_jax.train, "compile_buckets", stop)
    assert run(tiny_run.get_config(f"data={data}"), whole) == EXIT_STATUS
    told = "differs from the checkpoint: mesh: checkpoint has data 1, fsdp 1, context 1, tensor 1, "
    assert (f"{told}this command has data 2" in capsys.readouterr().err) == (devices == 2)


def checked(config, workdir) -> dict[str, str]:
    """{check: what it found} of a dry run with nothing wrong."""
    dry_run = DryRun(config, str(workdir), "v5e:1x1", lambda finding: None)
    dry_run.run()
    assert [str(finding) for finding in dry_run.findings if not finding.good] == []
    return {finding.name: finding.text for finding in dry_run.findings}


def test_a_workdir_in_a_bucket_holds_what_a_local_one_does(data, whole, tmp_path, monkeypatch):
    """Checkpoints and data included; interrupted once. Then exported and imported there."""
    asked = gcs_server.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    gcs_server.put(data, "gs://bucket/data")
    workdir = epath.Path("gs://bucket/run")
    config = tiny_run.get_config("data=gs://bucket/data")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        assert run(config, workdir) == EXIT_STATUS
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
    assert run(config, workdir) == 0
    assert json.loads((workdir / "ledger.json").read_text())["restarts"] == 1
    assert any(line.startswith("POST ") and "ocdbt" in line for line in asked)
    assert any(line.startswith("GET ") and "array_record" in line for line in asked)
    assert metrics(workdir) == metrics(whole)
    assert_same_model(workdir / "model", whole / "model")
    assert_same_model(workdir / "best_model", whole / "best_model")
    for folder in (".", "checkpoints"):
        names = {path.name for path in (workdir / folder).iterdir()}
        assert names == {path.name for path in (whole / folder).iterdir()}
    written = (workdir / "config.json").read_text().replace("gs://bucket/data", str(data))
    assert written == (whole / "config.json").read_text()
    found = checked(read_json(workdir / "config.json"), workdir)
    assert "12" in found["workdir"] and "data.validation" in found
    stage = f"data=gs://bucket/data,init_from={workdir}/model"
    assert "leaves" in checked(tiny_run.get_config(stage), "")["init_from"]
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # one file a process

    names = export_model(workdir / "model", "gs://bucket/exported")
    assert names == export_model(whole / "model", tmp_path / "exported")
    for file in (path for path in (tmp_path / "exported").rglob("*") if path.is_file()):
        there = epath.Path("gs://bucket/exported") / file.relative_to(tmp_path / "exported")
        assert there.read_bytes() == file.read_bytes(), file.name
    import_model("gs://bucket/exported", "gs://bucket/imported")
    assert_same_model("gs://bucket/imported", whole / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}


def test_a_model_in_a_bucket_is_evaluated_there(data, whole, tmp_path, monkeypatch):
    gcs_server.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    gcs_server.put(whole / "model", "gs://bucket/model")
    gcs_server.put(data, "gs://bucket/data")
    for where, videos, out in (("gs://bucket/model", "gs://bucket/data", "gs://bucket/eval.json"),
                               (whole / "model", data, "e.json")):  # fmt: skip
        command = [f"--model={where}", f"--data={videos}/validation", f"--out={out}"]
        assert evaluate.main(command) == 0
    there, here = results.read_json("gs://bucket/eval.json"), results.read_json("e.json")
    assert there["metrics"] == here["metrics"] and there["metrics"]
    samples = results.read_samples("gs://bucket/eval.json")
    assert samples and samples == results.read_samples("e.json")


def test_a_slow_copy_to_the_host_is_waited_for_before_the_update(
    data, whole, tmp_path, monkeypatch, capsys
):
    """A local save every step; the copies of one take longer than a gradient."""
    real = local_checkpoints._to_host

    def slow(part):
        time.sleep(0.001)
        return real(part)

    monkeypatch.setattr(local_checkpoints, "_to_host", slow)
    config = tiny_run.get_config(f"data={data}")
    config.checkpoint.update(local_dir=str(tmp_path / "local"), local_every=1)
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        assert run(config, tmp_path / "run") == EXIT_STATUS
    assert run(config, tmp_path / "run") == 0
    assert "going on from the local checkpoint of step" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == metrics(whole)
    assert_same_model(tmp_path / "run/model", whole / "model")


def test_a_damaged_checkpoint_is_refused_and_an_older_one_gives_the_same(data, whole, tmp_path):
    config = tiny_run.get_config(f"data={data}")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = next((tmp_path / "checkpoints/12/state/ocdbt.process_0/d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="another checksum(.|\n)*--resume_from=10"):
        run(config, tmp_path)
    assert run(config, tmp_path, resume_from=10) == 0
    assert metrics(tmp_path) == metrics(whole)
    assert_same_model(tmp_path / "model", whole / "model")
    assert (tmp_path / "checkpoints/12.set_aside").exists()


def test_sigterm_while_compiling_stops_after_that_program(data, tmp_path, monkeypatch):
    config, lowered = tiny_run.get_config(f"data={data},buckets=1"), []
    real = Program.lower_gradient

    def lower(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        lowered.append(batch)
        return real(self, batch)

    monkeypatch.setattr(Program, "lower_gradient", lower)
    monkeypatch.setattr(tpo_jax.train, "compile_buckets", compiled.compile_buckets)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: "program")
    assert run(config, tmp_path) == EXIT_STATUS
    assert len(lowered) == 1 and not (tmp_path / "checkpoints").exists()  # the first save makes it


def test_a_mixture_changes_at_a_checkpoint_when_it_is_meant_to(data, whole, tmp_path, capsys):
    config = tiny_run.get_config(f"data={data}")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config.data.train[0]["weight"] = 2.0
    with pytest.raises(CheckpointError, match=r"data.train\[0\].weight(.|\n)*--new_mixture"):
        run(config, tmp_path, resume_from=10)
    assert run(config, tmp_path, resume_from=10, new_mixture=True) == 0
    told = "data.train[0].weight: checkpoint has 1.0, this command has 2.0"
    assert told in capsys.readouterr().err
    # One source: whatever its weight, it gives the same.
    assert metrics(tmp_path) == metrics(whole)


def test_a_step_that_diverges_is_written_down_undone_and_skipped(
    data, tmp_path, monkeypatch, capsys
):
    config = tiny_run.get_config(f"data={data}")
    config.divergence.rollbacks = 1
    config.eval_every = 0
    seen = []

    def poison(local, mesh):
        """Gives the 8th batch a label of infinite weight."""
        seen.append(local["example_ids"].copy())
        if len(seen) == 8:
            local["answer_weights"][0] = np.inf
        return global_batch(local, mesh)

    monkeypatch.setattr(tpo_jax.train, "global_batch", poison)
    assert run(config, tmp_path) == 0
    report = json.loads((tmp_path / "divergence/step_8.json").read_text())
    assert report["reason"] == "loss or gradient is not finite" and report["loss"] == "nan"
    assert set(report["grad_norms"].values()) == {"nan"} and len(report["grad_norms"]) > 20
    assert "back to step 5;" in capsys.readouterr().err
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["rollbacks"] == 1 and ledger["step"] == 12 and ledger["seconds"]["restart"] > 0
    # Steps 6 and 7, the 8th and, one step late, the 9th; then 6 to 12 again.
    assert len(seen) == 9 + 7
    pipeline_skips = {name for row in report["rows"] for name in row["examples"]}
    progress = json.loads((tmp_path / "checkpoints/12/run/data.json").read_text())["progress"]
    assert set(progress["skipped"]) == pipeline_skips
    # The skipped rows count for nothing: blank rows have the id 0.
    assert (seen[9 + 2] == 0).all() and (seen[7] != 0).all()
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12]
    assert all(r["train/nonfinite"] == 0 for r in records)


def test_a_run_without_a_finite_step_ends_with_what_to_change(data, tmp_path, monkeypatch, capsys):
    config = tiny_run.get_config(f"data={data}")

    def poison(local, mesh):
        local["answer_weights"][0] = np.inf
        return global_batch(local, mesh)

    monkeypatch.setattr(tpo_jax.train, "global_batch", poison)
    monkeypatch.setattr(tpo_jax.train, "run", lambda argv: run(config, tmp_path))
    with pytest.raises(SystemExit) as stopped:
        tpo_jax.train.main(["train"])
    assert stopped.value.code == 2
    assert (
        f"error: step 2: no step since the last record had a finite loss and gradient ({tmp_path}/"
        "divergence/ has their examples and norms); lower the learning rates (config.trainable) or "
        "raise config.optimizer.warmup, in another --workdir\n"
    ) in capsys.readouterr().err
    assert (tmp_path / "divergence/step_1.json").exists()


def test_a_stage_starts_from_a_model_folder_and_trains_only_its_group(data, whole, tmp_path):
    arg = f"data={data},heads=True,steps=2,buckets=1,init_from={whole / 'model'}"
    config = tiny_run.get_config(arg)
    config.eval_every = 0
    with pytest.raises(ModelFolderError, match="heads/region/.*init_missing"):
        run(config, tmp_path / "strict")
    assert not list(tmp_path.iterdir())
    config.init_missing = ["task_tokens/", "box_encoder/", "heads/"]
    config.trainable = [["heads/", 1e-3]]
    assert run(config, tmp_path / "stage") == 0
    old_config, old, _ = load_model(whole / "model")
    new_config, new, codec = load_model(tmp_path / "stage/model")
    assert new_config.heads == ("region", "temporal") and not old_config.heads
    old, new = flatten(old), flatten(new)
    added = sorted(new_config.tokens.values())
    assert added == list(range(added[0], codec.vocab_size))
    for path, leaf in old.items():
        kept = np.ones(len(leaf), bool) if leaf.ndim else np.ones((), bool)
        if path == "language/embed/table":
            kept[added] = False
            mean = leaf[: added[0]].mean(axis=0, dtype=np.float32)
            np.testing.assert_allclose(new[path][added], np.tile(mean, (len(added), 1)), atol=1e-6)
        if path == "language/lm_head/kernel":
            leaf, new[path] = np.delete(leaf, added, 1), np.delete(new[path], added, 1)
        np.testing.assert_array_equal(new[path][kept], leaf[kept], err_msg=path)


def test_a_batch_of_another_shape_is_an_error_with_the_shapes(data, tmp_path, monkeypatch):
    def cut(local, mesh):
        return global_batch(local | {"frames": local["frames"][:, :1]}, mesh)

    monkeypatch.setattr(tpo_jax.train, "global_batch", cut)
    with pytest.raises(ValueError, match=r"bucket '\w+' would compile again:\s+frames: compiled"):
        run(tiny_run.get_config(f"data={data}"), tmp_path)


def test_the_command_line_exits_with_75_on_sigterm(data, whole, tmp_path):
    """The real process: signal from outside, exit status, overrides, restart."""
    command = [
        sys.executable, "-m", "tpo_jax.train",
        f"--config=tests/tiny_run.py:data={data},steps=100000,buckets=1",
        f"--workdir={tmp_path}", "--config.log_every=1", "--config.eval_every=0",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": QUICK}
    metrics_file, log = tmp_path / "metrics.jsonl", tmp_path / "log.txt"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr) as process,
    ):
        while not metrics_file.exists() or len(metrics_file.read_text().splitlines()) < 4:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
                break  # it ended by itself: the status below tells
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
    assert process.returncode == EXIT_STATUS, log.read_text()
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert ledger["step"] == max(steps) == metrics(tmp_path)[-1]["step"] > 3


@pytest.mark.parametrize(
    ("override", "message"),
    [("--config.stepz=3", "stepz"), ("--config.optimizer.clip=-1", "optimizer.clip")],
)
def test_a_wrong_option_stops_the_command_by_name(data, tmp_path, override, message):
    command = [
        sys.executable, "-m", "tpo_jax.train", f"--config=tests/tiny_run.py:data={data}",
        f"--workdir={tmp_path / 'run'}", override,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "run").exists()
