"""The train step, compiled for TPUs that are not there."""

import dataclasses
import importlib.util
import types

import gcs_server
import jax
import processes
import pytest
import tiny_run
from fake_batches import bucket, micro, train_config

from tpo_jax import plan, train
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.pipeline import row_builder
from tpo_jax.parallel.collectives import Collective
from tpo_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from tpo_jax.parallel.topologies import GIB, parse_topology, topology_devices
from tpo_jax.parallel.transfers import find_transfers
from tpo_jax.training.estimate import estimate_step
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.start import make_model_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `plan`)"
)


class Lowered(Exception):
    """Stops a command where it would compile."""


@pytest.fixture
def lowered(monkeypatch):
    """What Program.lower_gradient is called with, instead of lowering; no update is compiled."""
    calls = []
    update = types.SimpleNamespace(compile=lambda: None)
    monkeypatch.setattr(Program, "lower_update", lambda self: update)

    def record(self, batch):
        calls.append((self.train_step, jax.tree.map(lambda x: (x.shape, x.dtype), batch)))
        raise Lowered

    monkeypatch.setattr(Program, "lower_gradient", record)
    return calls


def test_plan_compiles_the_function_that_train_runs(tmp_path, lowered):
    """Both take it from `make_program` and lower it for the same shapes, through one method."""
    assert plan.make_program is train.make_program
    tiny_run.write_data(tmp_path)
    config = tiny_run.get_config(f"data={tmp_path},heads=True,buckets=1")
    config.time_instruction = True
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
    (shapes,) = plan.read_buckets(config.buckets.to_dict(), codec)
    builders = {shapes.name: row_builder(codec, model_config, shapes)}
    with pytest.raises(Lowered):
        train.compile_buckets(program, builders, False, print, train.Preemption())
    with pytest.raises(Lowered):
        plan.plan_bucket(program, model_config, shapes)
    (trained, train_shapes), (planned, plan_shapes) = lowered
    assert trained is planned and train_shapes == plan_shapes
    visual = model_config.visual_offset + model_config.num_visual_tokens(shapes.frames)
    prefix = plan_shapes["prefix_tokens"][0][1]
    assert prefix == visual + codec.after_visual + codec.time_room(shapes.frames) > visual + 100


def test_a_step_of_two_buckets_is_planned_as_one(lowered):
    program = make_program(train_config(), micro(), make_mesh({}, jax.devices()[:1]))
    with pytest.raises(Lowered):
        plan.plan_bucket(program, micro(), bucket(8), beside=bucket(4))
    ((_, shapes),) = lowered
    assert shapes["frames"][0][0] == 8 and shapes["beside"]["frames"][0][0] == 4


def test_a_config_in_a_bucket_is_planned(tmp_path, lowered, monkeypatch, capsys):
    """The rows have the room that the tokenizer and the model there ask for."""
    gcs_server.install(monkeypatch)
    gcs_server.put(tiny_run.write_data(tmp_path / "data"), "gs://bucket/data")
    monkeypatch.setattr(plan, "topology_devices", lambda name, num_slices: jax.devices()[:1])
    monkeypatch.setattr(plan, "plan_update", lambda program: plan.ProgramPlan(None, 0, None, 0, {}))
    for data in (tmp_path / "data", "gs://bucket/data"):
        with pytest.raises(Lowered):
            plan.plan(tiny_run.get_config(f"data={data},buckets=1"), "v5e:1x1")
    (_, local), (_, remote) = lowered
    assert remote == local


def test_steps_are_priced_by_the_estimate_and_each_bucket_by_its_steps(
    tmp_path, monkeypatch, capsys
):
    """Bytes in the text of a program, which are no measure, price nothing."""

    def fake(bucket):
        text = {"all-gather": Collective(3, 1e15)}
        return plan.ProgramPlan(bucket, 0.0, plan.Memory(GIB, 0, 0, GIB, 0), GIB, text)

    estimates = []

    def estimate(*step):
        estimates.append(estimate_step(*step))
        return estimates[-1]

    monkeypatch.setattr(plan, "topology_devices", lambda name, num_slices: jax.devices()[:2])
    monkeypatch.setattr(plan, "plan_update", lambda program: fake(None))
    monkeypatch.setattr(plan, "plan_bucket", lambda program, model, bucket, *_: fake(bucket))
    monkeypatch.setattr(plan, "estimate_step", estimate)
    data = tiny_run.write_data(tmp_path)
    config = tiny_run.get_config(f"data={data}")  # 12 steps, of weights 1 and 0.5
    config.accumulation = 2
    plan.plan(config, "v5e:1x2")
    out, (chip, _) = capsys.readouterr().out, parse_topology("v5e:1x2")
    assert out.count("collectives     3 all-gather\n") == 3
    (sent,) = {each.sent_a_step["all-reduce"] for each in estimates}
    assert sent == 2 * estimates[0].sent["all-reduce"] > 1e5
    assert out.count(f"sent a step     all-reduce {sent / 1e9:.3g} GB a chip, estimated\n") == 2
    assert out.count(f"ICI {1e3 * sent / chip.ici:.3g})") == 2
    long, short = (2 * each.roofline(chip).seconds / 3600 for each in estimates)
    assert f", 8 steps {8 * long:.3g} chip-hours on 2 chips" in out
    assert f", 4 steps {4 * short:.3g} chip-hours on 2 chips" in out
    assert f"all 12 steps: at least {8 * long + 4 * short:.3g} chip-hours on 2 chips\n" in out


@needs_libtpu
@pytest.mark.plan
def test_fits_and_is_partitioned():
    mesh = make_mesh({"data": 2, "fsdp": 4}, topology_devices("v5e:2x4"))
    program = make_program(train_config(), micro(), mesh)
    found = plan.plan_bucket(program, micro(), bucket(8))
    assert found.fits(16 * GIB) and not found.fits(1024)
    assert found.memory.arguments < found.needed < GIB
    # Parameters are gathered for use and gradients are summed over rows.
    assert found.collectives["all-gather"].bytes > 0
    assert {"all-reduce", "reduce-scatter"} & set(found.collectives)
    update = plan.plan_update(program)
    assert update.fits(16 * GIB) and "update: compiled" in plan.report(update, "v5e:2x4")
    text = plan.report(found, "v5e:2x4")
    assert "of 16 GiB: fits" in text and "all-gather" in text


@needs_libtpu
@pytest.mark.plan
@pytest.mark.long
def test_moments_of_the_host_take_no_memory_of_a_chip():
    """They are no arguments of the chip's, of neither program; the update brings them there."""
    mesh = make_mesh({"data": 2, "fsdp": 2}, topology_devices("v5e:2x2"))
    programs = {}
    for moments in ("float32", "host"):
        config = train_config()
        config.optimizer.moments = moments
        programs[moments] = make_program(config, micro(), mesh)
    usual, update = (plan.plan_update(programs[name]) for name in ("float32", "host"))
    gradient = plan.plan_bucket(programs["host"], micro(), bucket(8))
    # Two moments, as large as gradients; the compiler fills small leaves up to whole tiles.
    assert update.memory.host >= 2 * plan.gradient_bytes(programs["host"])
    assert usual.memory.host == 0
    assert usual.memory.arguments - update.memory.arguments == update.memory.host
    assert gradient.memory.host == update.memory.host
    for found in (update, gradient):
        assert found.needed == sum(dataclasses.astuple(found.memory)[:3])
        assert f"and of the host {found.memory.host / GIB:.3f})" in plan.report(found, "v5e:2x2")


@needs_libtpu
@pytest.mark.plan
def test_only_gradients_cross_between_slices():
    mesh = make_mesh({"data": 4, "fsdp": 2}, topology_devices("v5e:2x2", 2))
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    program = make_program(train_config(), micro(), mesh)
    found = plan.plan_bucket(program, micro(), bucket(8))
    assert {transfer.kind for transfer in found.transfers} == {"ALL_REDUCE"}
    assert sum(transfer.bytes for transfer in found.transfers) >= found.gradients > 1e5
    assert found.beside_gradients < plan.MOST_BESIDE_GRADIENTS
    # One of them sums the examples of each task, which are integers.
    assert "in 51 ALL_REDUCE MB a chip, gradients are" in plan.report(found, "v5e:2x2", 2)


@needs_libtpu
@pytest.mark.plan
def test_what_else_crosses_between_slices_is_seen():
    mesh = make_mesh({"data": 8}, topology_devices("v5e:2x2", 2))
    rows = jax.ShapeDtypeStruct((64, 1024), "float32", sharding=batch_sharding(mesh))
    gathered = jax.jit(lambda x: x * 2, out_shardings=replicated(mesh)).lower(rows).compile()
    (transfer,) = find_transfers(gathered.as_text())
    # A chip hands over the rows that it has, or all those of its slice.
    assert transfer.kind == "ALL_GATHER" and transfer.bytes in (8 * 4096, 32 * 4096)


@needs_libtpu
@pytest.mark.plan
@pytest.mark.parametrize("attention", ["xla", "splash"])
def test_rows_of_pairs_are_split_over_the_context_axis(attention):
    """Weights are whole on every chip: what is gathered are keys and values of the prefix."""
    config = micro()
    vision = dataclasses.replace(config.vision, motion=False, temporal="none")
    language = dataclasses.replace(config.language, attention=attention)
    config = dataclasses.replace(config, vision=vision, language=language)
    mesh = make_mesh({"data": 2, "context": 2}, topology_devices("v5e:2x2"))
    program = make_program(train_config(objective="preference"), config, mesh)
    shapes = bucket(4, name="pairs", frames=8, question=200)
    found = plan.plan_bucket(program, config, shapes)
    assert found.fits(16 * GIB)
    prefix = batch_spec(shapes, config)["prefix_tokens"].shape[1]
    one = shapes.batch_size // 2 * prefix * language.kv_heads * language.head_dim * 4
    # Keys and values of every layer; a chip sends the half that it has.
    assert found.collectives["all-gather"].bytes >= 2 * language.depth * one / 2


@needs_libtpu
@pytest.mark.plan
@pytest.mark.parametrize(
    ("name", "chips"), [("v4:2x2x2", 8), ("v5p:2x2x1", 4), ("v5e:16x16", 256), ("v6e:2x4", 8)]
)
def test_a_chip_is_a_device(name, chips):
    assert len(topology_devices(name)) == chips


@needs_libtpu
@pytest.mark.plan
def test_command_exits_with_the_figure_when_it_does_not_fit(tmp_path):
    """A batch that no chip holds; the figure and the fix are on stderr, the status is 1."""
    tiny_run.write_data(tmp_path)
    command = processes.start(
        "-m", "tpo_jax.plan", "--topology=v5e:1x1",
        f"--config=tests/tiny_run.py:data={tmp_path},buckets=1",
        "--config.buckets.long.batch_size=400000",
    )  # fmt: skip
    (done,) = processes.finish([command])
    assert done.status == 1, done
    assert "DOES NOT FIT" in done.out
    assert "bucket long needs" in done.err and "v5e:1x1 has 16" in done.err


@needs_libtpu
@pytest.mark.plan
@pytest.mark.long
def test_a_dry_run_checks_the_run_and_compiles_it(tmp_path):
    """The whole command; each of its two processes prints what it found."""
    tiny_run.write_data(tmp_path)
    command = processes.start(
        "-m", "tpo_jax.train", f"--config=tests/tiny_run.py:data={tmp_path},buckets=1",
        "--dry_run=compile", "--topology=v5e:2x2",
    )  # fmt: skip
    (done,) = processes.finish([command])
    assert done.status == 0, done
    checks, programs = done.out.split("1 x v5e:2x2, mesh ")
    assert "WRONG" not in checks and "ok    data.validation" in checks
    assert "bucket long: 4 rows, 4 frames, compiled in" in programs
    assert programs.count("of 16 GiB: fits") == 2 and "2 programs compiled in" in programs


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.50G) exceeds available HBM (15.75G).",
    ],
)
def test_out_of_memory_gives_the_figure(message):
    assert plan.out_of_memory(message) == int(17.5 * GIB)


def test_other_compiler_errors_are_not_taken_for_it():
    assert plan.out_of_memory("INTERNAL: something else") is None
