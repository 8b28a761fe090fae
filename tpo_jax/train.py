"""Trains a model, from a config to a model folder. Reads top to bottom.

    python -m tpo_jax.train --config=configs/demo.py:stage=1 --workdir=runs/demo/stage1
    python -m tpo_jax.train --config=configs/demo.py:stage=2 --workdir=runs/stage2 --config.seed=1

The workdir then holds config.json, metrics.jsonl, tensorboard/, ledger.json, checkpoints/, model/
(the last weights) and, with validation, best_model/ (those of the lowest validation loss).

The same command goes on where a run stopped: batches, losses and weights are those of a run that
was never interrupted. SIGTERM saves a checkpoint and exits with status 75 (start me again).

Several processes: on TPU pods run the same command on every host. Elsewhere give each process
--coordinator=HOST:PORT --num_processes=N --process_id=I (or the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID).
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.rows import Reference
from tpo_jax.data.text import TextCodec, add_task_tokens
from tpo_jax.generation import sidecar
from tpo_jax.interop.folder import (
    added_tokens,
    holds_language_only,
    load_codec,
    load_config,
    load_into,
    load_model,
    save_model,
)
from tpo_jax.models.config import VOCABULARY_MULTIPLE, ModelConfig
from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import global_batch, make_mesh, reader_shard
from tpo_jax.parallel.paths import flatten, unflatten
from tpo_jax.parallel.weighted_sum import WeightedSum
from tpo_jax.training import config as training_config
from tpo_jax.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from tpo_jax.training.compiled import CompiledBucket, compile_buckets
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import EXIT_STATUS, Preemption
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.step import weighted_total
from tpo_jax.training.writers import (
    Jsonl,
    MetricWindow,
    StdoutProgress,
    TensorBoard,
    Writers,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARG].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; local or gs://.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process.")

# Beside the progress bar: name of the scalar, label.
_SHOWN = {
    "train/loss": "loss",
    "time/steps_per_second": "steps/s",
    "time/tokens_per_second": "tokens/s",
    "time/data_wait_share": "data wait",
}


def train(config: ConfigDict, workdir: epath.Path, preemption: Preemption, ledger: Ledger) -> int:
    """Runs or resumes the run in `workdir`; returns the exit status of the process."""
    is_writer = jax.process_index() == 0
    plain_config = training_config.to_dict(config)
    with ledger.measure("init"):
        ####################################################################### Mesh and model
        mesh = make_mesh(config.mesh.to_dict())
        model_config, codec = make_model_config(config)
        program = make_program(config, model_config, mesh)
        say(describe(program))

        ####################################################################### Data
        make_pipeline = functools.partial(
            Pipeline,
            codec=codec,
            model_config=model_config,
            heads=model_config.heads,
            buckets=plain_config["buckets"],
            seed=config.seed,
            reference=read_references(config),
            evidence=config.data.evidence,
            **dict(zip(("process_index", "process_count"), reader_shard(mesh), strict=True)),
        )
        pipeline = make_pipeline(plain_config["data"]["train"])
        validation = None
        if config.eval_every:
            validation = make_pipeline(plain_config["data"]["validation"])
        iterator = pipeline.iterator(threads=config.data.threads)

        ####################################################################### Weights
        # 1. A checkpoint in the workdir: everything, exactly.
        # 2. config.init_from: weights by name, everything else new.
        # 3. Random weights.
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        start = checkpoints.latest()
        if start is not None:
            restored = checkpoints.restore(start, program.abstract_state)
            check_same_config(workdir, restored.config, plain_config)
            state, progress = restored.state, restored.progress
            iterator.set_state(restored.data)
            ledger.resume(restored.ledger)
            say(f"resuming from step {start} of {config.steps}")
        else:
            start = 0
            state = program.init_state(initial_params(config, program, model_config))
            progress = {"evaluated": 0, "best": None, "window": {}}
        iterator.start_prefetch()  # the first batch is read while the program compiles
        base_key = program.base_key(config.seed)
        if is_writer:
            write_json(workdir / "config.json", plain_config)

    ########################################################################### Compile
    with ledger.measure("compile"):
        compiled = compile_buckets(program, pipeline.builders, validation is not None, say)

    ########################################################################### Writers
    writers = Writers([])
    if is_writer:
        bar = StdoutProgress(total=config.steps, initial=start, shown=_SHOWN)
        metrics_file = Jsonl(workdir / "metrics.jsonl", resume_step=start)
        tensorboard = TensorBoard(workdir / "tensorboard", resume_step=start)
        writers = Writers([bar, metrics_file, tensorboard])

    ########################################################################### Loop
    step, tokens = start, 0
    window, clock = MetricWindow(progress["window"]), Clock(ledger, start)
    pending: tuple[int, int, Any] | None = None  # last step, tokens, metrics; not yet written

    def write_pending() -> None:
        """Waits for the pending step; at the end of a window writes its record."""
        nonlocal pending, window
        if pending is None:
            return
        (at, tokens_then, metrics), pending = pending, None
        window.add(metrics)
        if at % config.log_every == 0 or at == config.steps:
            scalars = window.means("train/")
            check_finite(at, scalars)
            with ledger.measure("other"):
                writers.write_scalars(at, scalars | clock.record(at, tokens_then))
            window = MetricWindow()

    while True:
        # What is due at a step happens in this order, before the next batch is drawn, and leaves
        # its mark in `progress`: a run that stops anywhere resumes in the right place.
        due = config.eval_every and step and (step % config.eval_every == 0 or step == config.steps)
        if due and progress["evaluated"] < step:
            with ledger.measure("step"):
                write_pending()
            with ledger.measure("evaluation"):
                result = evaluate(config, program, compiled, validation, state.params, preemption)
                if result is not None:  # None: told to stop; evaluated again after the restart
                    writers.write_scalars(step, result)
                    progress["evaluated"] = step
                    loss = result["validation/loss"]
                    if progress["best"] is None or loss < progress["best"]["loss"]:
                        progress["best"] = {"step": step, "loss": loss}
                        save_model(workdir / "best_model", model_config, state.params, codec)
        stop = preemption.reached()
        if stop or step == config.steps or (step > start and step % config.checkpoint.every == 0):
            with ledger.measure("step"):
                write_pending()
            progress["window"] = window.state()
            with ledger.measure("checkpoint"):
                unit = (iterator.get_state(), dict(progress), ledger.state(), plain_config)
                checkpoints.save(step, Checkpoint(state, *unit))
        if stop or step == config.steps:
            break

        with ledger.measure("data_wait"):
            bucket, local = next(iterator)
        with ledger.measure("step"):
            batch = global_batch(local, mesh)
            state, metrics = compiled[bucket].train(state, batch, base_key)
            tokens += compiled[bucket].tokens
            step += 1
            write_pending()  # waits for the step before this one, while this one runs
            pending = step, tokens, metrics

    ########################################################################### End
    with ledger.measure("checkpoint"):
        checkpoints.close()
        if not stop:
            save_model(workdir / "model", model_config, state.params, codec)
    writers.close()
    if is_writer:
        summary = {"seconds": ledger.seconds(), "goodput": ledger.goodput(), "step": step}
        summary |= {"restarts": ledger.restarts, "best": progress["best"], "finished": not stop}
        write_json(workdir / "ledger.json", summary)
    say(f"{'stopped' if stop else 'finished'} at step {step}: {ledger.summary()}")
    return EXIT_STATUS if stop else 0


def check_same_config(workdir: epath.Path, saved: Any, current: Any) -> None:
    """Refuses to resume a run under a config that would continue it differently."""
    if changed := training_config.changed_since(saved, current):
        raise CheckpointError(
            f"{workdir}: holds a run with another config:\n  " + "\n  ".join(changed) + "\n"
            "Give the same options to resume it, or another --workdir to start a new run."
        )


def check_finite(step: int, scalars: dict[str, float]) -> None:
    """Stops a run of which nothing is left: no finite step since the last record."""
    if scalars["train/nonfinite"] == 1.0:
        raise FloatingPointError(
            f"no step up to {step} since the last record had a finite loss and gradient; "
            "lower the learning rates (trainable) or raise optimizer.warmup"
        )


def read_references(config: ConfigDict) -> Reference | None:
    """Reference log-probabilities by pair, or None where the config names no sidecars.

    Refuses sidecars that were not scored with the very model that the run starts from.
    """
    if not config.data.references:
        return None
    model_config, params, codec = load_model(config.init_from)
    (shape,) = {(bucket.frames, bucket.answers) for bucket in config.buckets.values()}
    frames, answers = shape
    expected = sidecar.Fingerprint.of(model_config, params, codec, frames)
    return sidecar.reference(config.data.references, expected, answers, codec.pad_id)


def make_model_config(config: ConfigDict) -> tuple[ModelConfig, TextCodec]:
    """The model that the config asks for, and its tokenizer with the tokens of its heads."""
    if config.init_from:
        codec = load_codec(config.init_from)
    else:
        text = epath.Path(config.tokenizer).read_text()
        codec = TextCodec(tokenizers.Tokenizer.from_str(text))
    heads = tuple(config.model.heads)
    add_task_tokens(codec.tokenizer, heads)
    codec = TextCodec(codec.tokenizer, codec.template)
    base = preset(config.model.preset) if config.model.preset else None
    if config.init_from and (base is None or holds_language_only(config.init_from)):
        base = load_config(config.init_from, base)
    rows = -(-codec.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    language = dataclasses.replace(
        base.language, num_tokens=codec.vocab_size,
        vocab_size=max(base.language.vocab_size, rows),
    )  # fmt: skip
    tokens = codec.task_tokens
    return dataclasses.replace(base, language=language, heads=heads, tokens=tokens), codec


def initial_params(config: ConfigDict, program: Program, model_config: ModelConfig) -> Any:
    """Weights at step 0, on the mesh: those of init_from, freshly drawn where it has none."""
    if not config.init_from:
        return program.init_params(config.seed)
    loaded = load_into(
        program.abstract_state.params,
        config.init_from,
        init_missing=config.init_missing,
        new_tokens=added_tokens(load_config(config.init_from, model_config), model_config),
    )
    say(f"weights from {config.init_from}: {len(loaded.leaves)} leaves")
    shardings = flatten(program.param_shardings)

    def draw_missing(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten(program.model.init(key))
        return {name: leaves[name] for name in loaded.missing}

    draw = jax.jit(draw_missing, out_shardings={name: shardings[name] for name in loaded.missing})
    drawn = draw(jax.random.key(config.seed)) if loaded.missing else {}
    for name in drawn:
        say(f"  new: {name} {drawn[name].shape}")
    return unflatten({name: (loaded.leaves | drawn)[name] for name in shardings})


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
        sums = {name: value + sums.get(name, zero) for name, value in metrics.items()}
    means = {f"validation/{name}": float(value.mean()) for name, value in sums.items()}
    return means | {"validation/loss": float(weighted_total(program.objective, sums))}


class Clock:
    """Rates since the last record."""

    def __init__(self, ledger: Ledger, step: int) -> None:
        self._ledger = ledger
        self._last = (time.monotonic(), step, 0, ledger.seconds())

    def record(self, step: int, tokens: int) -> dict[str, float]:
        """Scalars of the steps since the last record; `tokens` counts from the start."""
        now, seconds = time.monotonic(), self._ledger.seconds()
        then, last_step, last_tokens, last_seconds = self._last
        self._last = (now, step, tokens, seconds)
        # Validation and saves are not the loop's speed.
        loop = ("data_wait", "step", "other")
        spent = max(sum(seconds[name] - last_seconds[name] for name in loop), 1e-9)
        return {
            "time/steps_per_second": (step - last_step) / spent,
            "time/tokens_per_second": (tokens - last_tokens) / spent,
            "time/data_wait_share": (seconds["data_wait"] - last_seconds["data_wait"]) / spent,
            "time/wall_seconds": now - then,
            "time/goodput": self._ledger.goodput(),
        }


def describe(program: Program) -> str:
    """The start-up banner: who runs, on what, and what is trained."""
    mesh, leaves = program.mesh, flatten(program.abstract_state.params)
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    devices = mesh.devices.flat
    return (
        f"{devices[0].platform} x {mesh.size} ({devices[0].device_kind}), "
        f"mesh {dict(mesh.shape)}, {total:,} parameters\n{program.optimizer.report}"
    )


def say(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def write_json(path: epath.Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def initialize_distributed() -> None:
    """Joins the other processes, if there are any; must run before anything else touches JAX."""
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    on_tpu = any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio").exists()
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu"
    if given != (None, None, None) or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(*given)
    elif on_tpu and not cpu_only:  # a TPU VM finds its pod by itself
        jax.distributed.initialize()
    # Every process says that it is there: a host that does not start is otherwise a silent hang.
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    ledger = Ledger()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells forty lines a checkpoint
    with ledger.measure("init"):
        config = _CONFIG.value
        training_config.validate(config)
        initialize_distributed()
        if config.compile_cache:
            jax.config.update("jax_compilation_cache_dir", config.compile_cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        workdir = epath.Path(_WORKDIR.value)
        workdir.mkdir(parents=True, exist_ok=True)
    with Preemption() as preemption:
        status = train(config, workdir, preemption, ledger)
    sys.exit(status)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
