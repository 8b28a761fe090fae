"""Trains a model, from a config to a model folder. Reads top to bottom.

    python -m tpo_jax.train --config=configs/demo.py:stage=1 --workdir=runs/demo/stage1
    python -m tpo_jax.train --config=configs/demo.py:stage=2 --workdir=runs/stage2 --config.seed=1
    python -m tpo_jax.train --config=runs/stage2/config.json --workdir=runs/again

The workdir then holds config.json, metrics.jsonl, tensorboard/, ledger.json, checkpoints/, model/
(the last weights, which the next stage of a recipe starts from) and, with validation, best_model/
(those of the lowest validation loss). docs/training_metrics.md says when to take which.

The same command goes on where a run stopped: batches, losses and weights are those of a run that
was never interrupted. SIGTERM saves a checkpoint and exits with status 75 (start me again). A
checkpoint that is damaged is refused; --resume_from=STEP goes on from an older one.
docs/preemption.md has the rest. SIGUSR1 traces the next steps into profile/.

--dry_run checks config, data, shapes, sharding and checkpoints and trains nothing;
--dry_run=compile adds the memory plan (python -m tpo_jax.plan). With --topology=v5e:4x4 for a TPU
that is not there, and --num_slices=N for N of them over the data centre network.

Several processes: on TPU pods run the same command on every host. Elsewhere give each process
--coordinator=HOST:PORT --num_processes=N --process_id=I (or the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID).
"""

import concurrent.futures
import functools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from tpo_jax.data import files
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.errors import UserError, report
from tpo_jax.interop import output
from tpo_jax.interop.folder import save_model
from tpo_jax.models.heads.listed import load_listed
from tpo_jax.parallel.distributed import initialize_distributed
from tpo_jax.parallel.mesh import describe_shape, global_batch, make_mesh, reader_shard
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training import agreement
from tpo_jax.training import config as training_config
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.clock import Clock
from tpo_jax.training.compiled import CompiledBucket, compile_buckets, keep_programs
from tpo_jax.training.config_flag import define_config, define_dry_run, parse_flags
from tpo_jax.training.divergence import (
    Divergence,
    Guard,
    check_finite,
    rolled_back,
    write_report,
)
from tpo_jax.training.dry_run import DryRun
from tpo_jax.training.flops import peak_flops
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.preemption import EXIT_STATUS, Preempted, Preemption
from tpo_jax.training.profiling import Profiler, device_memory
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.references import verify_references
from tpo_jax.training.resume import check_same_run, find_start, read_checkpoint
from tpo_jax.training.save_policy import Due, SavePolicy
from tpo_jax.training.start import initial_params, make_model_config, pipeline_options
from tpo_jax.training.step import weighted_total
from tpo_jax.training.tasks import add_examples, example_scalars
from tpo_jax.training.writers import (
    Jsonl,
    MetricWindow,
    StdoutProgress,
    TensorBoard,
    WeightsAndBiases,
    Writers,
)

_CONFIG = define_config("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; local or gs://.")
_DRY_RUN = define_dry_run("dry_run", "Only check; =compile adds the memory plan.")
TOPOLOGY = flags.DEFINE_string("topology", "", "Of --dry_run, such as v5e:4x4; '': devices here.")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Of --topology.", lower_bound=1)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_RESUME_FROM = flags.DEFINE_integer(
    "resume_from", None, "Step of an older checkpoint to go on from; newer ones are set aside."
)
_NEW_MIXTURE = flags.DEFINE_bool(
    "new_mixture", False, "Let data.train differ from the checkpoint's: sources come, go, weigh."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process.")

for _name in ("config", "dry_run"):  # defined by another module, and of this command's --help
    flags.declare_key_flag(_name)

# Beside the progress bar: name of the scalar, label.
_SHOWN = {
    "train/loss": "loss",
    "time/steps_per_second": "steps/s",
    "time/tokens_per_second": "tokens/s",
    "time/data_wait_share": "data wait",
}


def train(
    config: ConfigDict,
    workdir: epath.Path,
    preemption: Preemption,
    ledger: Ledger,
    *,
    resume_from: int | None = None,
    new_mixture: bool = False,
) -> int:
    """Runs or resumes the run in `workdir`; returns the exit status of the process.

    Args:
      resume_from: step to resume from; None: the newest.
      new_mixture: whether data.train may differ from that of the checkpoint.
    """
    is_writer = jax.process_index() == 0
    plain_config = training_config.to_dict(config)
    with ledger.measure("init"):
        for name in ("model", "best_model"):  # which would be refused only after the training
            output.check(workdir / name, output.MODEL, config.init_from)

        ####################################################################### Mesh and model
        mesh = make_mesh(config.mesh.to_dict())
        model_config, codec = make_model_config(config)
        program = make_program(config, model_config, mesh)
        say(describe(program))

        ####################################################################### Agreement
        data_train, data_validation = plain_config["data"]["train"], []
        if config.eval_every:
            data_validation = plain_config["data"]["validation"]
        identity = agreement.identity([*data_train, *data_validation], mesh)
        agreement.check(agreement.facts(plain_config, mesh, identity))

        ####################################################################### Checkpoint
        policy = SavePolicy(**plain_config["checkpoint"])
        local = None
        if policy.local_every:
            local = LocalCheckpoints(policy.local_dir, workdir, program.abstract_state, say)
        checkpoints = Checkpoints(workdir / "checkpoints", policy, local)
        start = find_start(checkpoints, resume_from)
        saved = None
        if start is not None:
            saved = read_checkpoint(checkpoints, start)
            check_same_run(workdir, saved, plain_config, identity, new_mixture, say)

        ####################################################################### Data
        make_pipeline = functools.partial(
            Pipeline,
            **pipeline_options(config, model_config, codec),
            **dict(zip(("process_index", "process_count"), reader_shard(mesh), strict=True)),
        )
        table = saved.data["sources"] if saved else None
        pipeline = make_pipeline(data_train, table=table, start_step=start or 0)
        validation = make_pipeline(data_validation) if data_validation else None
        iterator = pipeline.iterator(start or 0, threads=config.data.threads)

        ####################################################################### Weights
        # 1. A checkpoint in the workdir: everything, exactly.
        # 2. config.init_from: weights by name, everything else new.
        # 3. Random weights.
        restoring = None
        if saved is not None:
            checkpoints.check(start, program.abstract_state)  # before anything is compiled
            # The arrays are read while the programs compile.
            reader = concurrent.futures.ThreadPoolExecutor(1, "restore")
            restoring = reader.submit(checkpoints.restore, start, program.abstract_state)
            progress = {"examples": {}} | saved.progress  # older checkpoints do not count them
            if "examples" not in saved.progress:
                say("the checkpoint does not say how many examples were seen: counted from here on")
            pipeline.skip(progress["skipped"])
            ledger.resume(saved.ledger)
            say(f"resuming from step {start} of {config.steps}")
        else:
            start = 0
            state = program.init_state(initial_params(config, program, model_config, say))
            progress = {
                "evaluated": 0, "evaluated_loss": None, "best": None, "window": {}, "losses": {},
                "best_saves": [], "skipped": [], "rollbacks": 0, "examples": {},
            }  # fmt: skip
        say(pipeline.describe_mixture(config.steps))
        for warning in (
            pipeline.describe_unseen(), pipeline.describe_kinds(config.preference.kinds),
            pipeline.describe_repeats(config.steps, config.data.epochs),
        ):  # fmt: skip
            if warning:
                say(warning)
        iterator.start_prefetch()  # the first batch is read while the program compiles
        base_key = program.base_key(config.seed)
        workdir.mkdir(parents=True, exist_ok=True)  # what was wrong has been told by now
        if is_writer:
            write_json(workdir / "config.json", plain_config)

    ########################################################################### Compile
    with ledger.measure("compile"):
        try:
            compiled = compile_buckets(
                program, pipeline.builders, validation is not None, say, preemption
            )
            if saved is None and config.data.references:
                verify_references(
                    program, pipeline, state.params, seed=config.seed,
                    files=config.data.references, say=say, preemption=preemption,
                )  # fmt: skip
        except Preempted:  # nothing has changed since the start
            say(f"stopped at step {start} while compiling")
            return EXIT_STATUS

    if restoring is not None:
        with ledger.measure("init"):
            state = restoring.result().state
            if resume_from is not None:
                aside = checkpoints.set_aside_after(start)
                say(f"set aside: {', '.join(map(str, aside)) or 'nothing newer'}")

    ########################################################################### Writers
    def open_writers(step: int, evaluated: int) -> Writers:
        if not is_writer:
            return Writers([])
        bar = StdoutProgress(total=config.steps, initial=step, shown=_SHOWN)
        file = workdir / "metrics.jsonl"
        metrics_file = Jsonl(file, resume_step=step, evaluated=evaluated)
        tensorboard = TensorBoard(workdir / "tensorboard", resume_step=step)
        online = [WeightsAndBiases(config.wandb, workdir, plain_config)] if config.wandb else []
        return Writers([bar, metrics_file, tensorboard, *online])

    writers = open_writers(start, progress["evaluated"])
    profiler = Profiler(workdir, config.profile)

    ########################################################################### Loop
    step, tokens, peak = start, 0, peak_flops(mesh.devices.flat)
    window, clock = MetricWindow(progress["window"]), Clock(ledger, start, peak)
    guard = Guard(config.divergence.spike, progress["losses"])
    failed: Divergence | None = None  # a step that is to be undone
    due_saves = Due(policy, progress["best_saves"])
    # The last step, tokens so far, bucket, metrics; not yet written.
    pending: tuple[int, int, str, Any] | None = None

    def write_pending() -> None:
        """Waits for the pending step; at the end of a window writes its record."""
        nonlocal pending, window, failed
        if pending is None:
            return
        (at, tokens_then, bucket, metrics), pending = pending, None
        norms = np.asarray(metrics.pop("grad_norms"))
        examples = np.asarray(metrics.pop("examples"))
        loss, finite = float(metrics["loss"].total), not float(metrics["nonfinite"].total)
        if found := guard.judge(at, bucket, loss, finite):
            _, rows = pipeline.describe_batch(at - 1)
            named = dict(zip(sorted(program.trainable), norms.tolist(), strict=True))
            file = write_report(workdir, found, bucket, rows, named)
            say(f"step {at}: {found.reason}; examples and gradient norms in {file}")
            if progress["rollbacks"] < config.divergence.rollbacks:
                failed = found
                return
        ledger.count_step(compiled[bucket].flops)
        progress["examples"] = add_examples(progress["examples"], examples)
        window.add(metrics)
        if at % config.log_every == 0 or at == config.steps:
            scalars = window.means("train/")
            check_finite(at, scalars, workdir)
            scalars |= example_scalars(progress["examples"])
            with ledger.measure("other"):
                measured = clock.record(at, tokens_then) | device_memory()
                writers.write_scalars(at, scalars | measured)
            window = MetricWindow()

    def finish_copy(gradients: Any) -> None:
        """Waits until no save reads the state any more, which the update overwrites."""
        if checkpoints.is_copying:
            jax.block_until_ready(gradients)  # until then nothing is lost: the devices work
            with ledger.measure_save(again=True):
                checkpoints.wait_for_copy()

    while True:
        if failed is not None:
            with ledger.measure("checkpoint"):
                checkpoints.wait()
                restored = checkpoints.restore(checkpoints.latest(), program.abstract_state)
            _, rows = pipeline.describe_batch(failed.step - 1)
            state, step, progress = restored.state, int(restored.state.step), rolled_back(
                restored.progress, progress, rows
            )
            say(f"back to step {step}; {len(progress['skipped'])} examples are skipped")
            ledger.roll_back(restored.ledger)
            pipeline.skip(progress["skipped"])
            iterator = pipeline.iterator(step, threads=config.data.threads)
            tokens, pending, failed = 0, None, None
            window, clock = MetricWindow(progress["window"]), Clock(ledger, step, peak)
            guard = Guard(config.divergence.spike, progress["losses"])
            due_saves = Due(policy, progress["best_saves"])
            writers.close()
            writers = open_writers(step, progress["evaluated"])
        # What is due at a step happens in this order, before the next batch is drawn, and leaves
        # its mark in `progress`: a run that stops anywhere resumes in the right place.
        due = config.eval_every and step and (step % config.eval_every == 0 or step == config.steps)
        if due and progress["evaluated"] < step:
            with ledger.measure("step"):
                write_pending()
            if failed is not None:
                continue
            with ledger.measure("evaluation"):
                result = evaluate(config, program, compiled, validation, state.params, preemption)
                if result is not None:  # None: told to stop; evaluated again after the restart
                    writers.write_scalars(step, result)
                    loss = result["validation/loss"]
                    progress |= {"evaluated": step, "evaluated_loss": loss}
                    if progress["best"] is None or loss < progress["best"]["loss"]:
                        progress["best"] = {"step": step, "loss": loss}
                        save_model(workdir / "best_model", model_config, state.params, codec)
        stop = preemption.reached()
        save = due_saves.at(
            step,
            fresh=step > start,
            loss=progress["evaluated_loss"] if progress["evaluated"] == step else None,
            last=step == config.steps,
            told=stop,
            poll=step % config.log_every == 0,
        )
        if save.kinds or (config.divergence.rollbacks and not step):  # there is a way back
            with ledger.measure("step"):
                write_pending()
            if failed is not None:
                continue
            progress |= {"window": window.state(), "losses": guard.state()}
            progress["best_saves"] = due_saves.losses
            with ledger.measure_save():
                writers.flush()  # what a checkpoint continues must not be lost with the process
                data = iterator.get_state() | {"sources": pipeline.table.to_json()}
                unit = (data, dict(progress), ledger.state(), plain_config, identity)
                checkpoints.save(step, Checkpoint(state, *unit), save)
        if stop or step == config.steps:
            break

        with ledger.measure("other"):
            profiler.before_step(step + 1, pending)
        with ledger.measure("data_wait"):
            bucket, local = next(iterator)
        with ledger.measure("step"):
            batch = global_batch(local, mesh)
            measured = {}
            if config.task_gradients_every and (step + 1) % config.task_gradients_every == 0:
                measured = compiled[bucket].measure_tasks(state, batch, base_key)
            state, metrics = compiled[bucket].train(state, batch, base_key, finish_copy)
            metrics |= measured
            if "padding" in metrics:
                metrics[f"padding/{bucket}"] = metrics.pop("padding")
            tokens += compiled[bucket].tokens
            step += 1
            write_pending()  # waits for the step before this one, while this one runs
            pending = step, tokens, bucket, metrics

    ########################################################################### End
    profiler.close(pending)
    with ledger.measure("checkpoint"):
        checkpoints.close()
        if not stop:
            save_model(workdir / "model", model_config, state.params, codec)
            checkpoints.forget_local()
    writers.close()
    if is_writer:
        summary = {"seconds": ledger.seconds(), "goodput": ledger.goodput(), "step": step}
        summary |= {"restarts": ledger.restarts, "best": progress["best"], "finished": not stop}
        summary |= {"model_flops": ledger.model_flops, "mfu": ledger.mfu(peak)}
        summary |= {"saves": ledger.saves, "rollbacks": progress["rollbacks"]}
        write_json(workdir / "ledger.json", summary)
    if not stop and progress["best"] is not None:
        say(describe_models(step, progress))
    say(f"{'stopped' if stop else 'finished'} at step {step}: {ledger.summary()}")
    return EXIT_STATUS if stop else 0


def evaluate(
    config: ConfigDict,
    program: Program,
    compiled: dict[str, CompiledBucket],
    validation: Pipeline,
    params: Any,
    preemption: Preemption,
) -> dict[str, float] | None:
    """Means over the same eval_batches batches every time, or None when told to stop."""
    sums: dict[str, WeightedSum] = {}
    zero = WeightedSum(np.float32(0), np.float32(0))
    batches: Iterator[Any] = validation.iterator(threads=config.data.threads)
    for _ in range(config.eval_batches):
        if preemption.reached():
            return None
        bucket, local = next(batches)
        metrics = jax.device_get(
            compiled[bucket].evaluate(params, global_batch(local, program.mesh))
        )
        sums |= {name: value + sums.get(name, zero) for name, value in metrics.items()}
    means = {f"validation/{name}": float(value.mean()) for name, value in sums.items()}
    return means | {"validation/loss": float(weighted_total(program.objective, sums))}


def describe(program: Program) -> str:
    """The start-up banner: who runs, on what, and what is trained."""
    mesh, leaves = program.mesh, flatten(program.abstract_state.params)
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    devices = mesh.devices.flat
    return (
        f"{devices[0].platform} x {mesh.size} ({devices[0].device_kind}), "
        f"mesh {describe_shape(mesh)}, {total:,} parameters\n{program.optimizer.report}"
    )


def describe_models(step: int, progress: dict[str, Any]) -> str:
    """Which weights the two model folders of a finished run hold."""
    best, last = progress["best"], progress["evaluated_loss"]
    return (
        f"model/: the last weights, step {step}, validation loss {last:.4f}\n"
        f"best_model/: those of the lowest validation loss, step {best['step']}, {best['loss']:.4f}"
    )


def say(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def write_json(path: epath.Path, value: Any) -> None:
    files.write(path, json.dumps(value, indent=2) + "\n")


def dry_run(
    config: ConfigDict, workdir: str, mode: str, topology: str, num_slices: int = 1
) -> int:
    """Checks a run that is not started; returns the exit status, 1 if something is wrong."""
    if mode == "compile" and not topology:
        raise UserError("--dry_run=compile needs --topology, such as v5e:4x4")
    if topology:
        jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free
    say = functools.partial(print, flush=True)
    good = DryRun(config, workdir, topology, say, num_slices).run()
    if not good or mode != "compile":
        return 0 if good else 1
    # A process of its own: the compiler's memory is free again, and its flags are its own.
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "config.json"
        write_json(path, training_config.to_dict(config))
        command = [sys.executable, "-m", "tpo_jax.plan", f"--config={path}"]
        where = [f"--topology={topology}", f"--num_slices={num_slices}"]
        return subprocess.run([*command, *where]).returncode


def main(argv: list[str]) -> None:
    try:
        sys.exit(run(argv))
    except UserError as error:
        sys.exit(report(error))


def run(argv: list[str]) -> int:
    """The command; returns its exit status."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}; see --help")
    if _CONFIG.value is None:
        raise UserError("--config is missing; give one such as configs/demo.py:stage=1")
    if not _WORKDIR.value and not _DRY_RUN.value:
        raise UserError("--workdir is missing; name the folder of the run, or give --dry_run")
    if _DRY_RUN.value:
        where = _WORKDIR.value or ""
        on = TOPOLOGY.value, NUM_SLICES.value
        return dry_run(_CONFIG.value, where, _DRY_RUN.value, *on)
    ledger = Ledger()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the loop listens
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells forty lines a checkpoint
    with Preemption() as preemption:  # a signal from here on ends the command with status 75
        with ledger.measure("init"):
            config = _CONFIG.value
            training_config.validate(config)
            initialize_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            preemption.joined()
            if config.compile_cache:
                keep_programs(config.compile_cache)
        return train(
            config, epath.Path(_WORKDIR.value), preemption, ledger,
            resume_from=_RESUME_FROM.value, new_mixture=_NEW_MIXTURE.value,
        )  # fmt: skip


if __name__ == "__main__":
    load_listed()  # before the config file is read
    app.run(main, flags_parser=parse_flags)
