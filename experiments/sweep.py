"""Runs every configuration that a config file's `sweep(add)` asks for.

    python -m experiments.sweep --config=configs/demo.py:stage=2 --out=runs/seeds --parallel=2
    python -m experiments.sweep --config=configs/demo.py:stage=2 --out=gs://BUCKET/seeds \\
        --launcher=queued_resources --parallel=4 \\
        --launch=project=P,zone=us-west4-a,accelerator=v5litepod-16,runtime=v2-alpha-tpuv5-lite
    python -m experiments.sweep --out=runs/seeds --report

The same command goes on where a sweep stopped: finished runs are skipped, interrupted ones resume.
It ends with OUT/sweep.html and OUT/sweep.csv, a table of what varied and what came out; --report
makes just these. --dry_run prints what would be started, and starts and writes nothing.
Exits with 1 if a run failed, with 75 if it was told to stop. See docs/sweeps.md.
"""

import pathlib
import shlex
import sys
from typing import Any

from absl import app, flags
from etils import epath

from experiments.launchers.local import Job, Local, Pool
from experiments.launchers.queued_resources import QueuedResources
from experiments.launchers.slurm import Slurm
from experiments.launchers.xpk import Xpk
from experiments.sweeps import report
from experiments.sweeps.runs import EXIT_FILE, Run, expand, found_in, progress, write_config
from tpo_jax.training.config import ConfigError, parse_arg
from tpo_jax.training.preemption import EXIT_STATUS

LAUNCHERS = {
    "local": Local,
    "queued_resources": QueuedResources,
    "xpk": Xpk,
    "slurm": Slurm,
}

_CONFIG = flags.DEFINE_string("config", "", "Config file with sweep(add), FILE.py[:ARG].")
_OUT = flags.DEFINE_string("out", None, "Folder of the sweep, one workdir a run; may be gs://.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", list(LAUNCHERS), "Where runs are started.")
_LAUNCH = flags.DEFINE_string("launch", "", "Options of the launcher, key=value,...")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print what would be started.")
_METRIC = flags.DEFINE_string("metric", "", "What runs are compared by, such as validation/loss.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the table of what is there.")


def make_launcher(name: str, options: str) -> Any:
    """The launcher with the options of --launch.

    Raises:
      ConfigError: an option that it does not have, or a value of the wrong type.
    """
    launcher = LAUNCHERS[name]
    defaults = {field: value.default for field, value in launcher.__dataclass_fields__.items()}
    return launcher(**parse_arg(options, **defaults).to_dict())


def command_of(launcher: Any, run: Run) -> list[str]:
    """What is executed here for a run."""
    if isinstance(launcher, Local):
        return launcher.command(run)
    return ["bash", "-c", launcher.script(run)]


def describe(launcher: Any, run: Run) -> str:
    """The same as text that a shell understands."""
    if isinstance(launcher, Local):
        return shlex.join(launcher.command(run)) + "\n"
    return launcher.script(run)


def log_folder(out: epath.Path) -> pathlib.Path:
    """Processes write their output to local files, also when the sweep is on gs://."""
    if "://" in str(out):
        return pathlib.Path("runs") / "logs" / out.name
    return pathlib.Path(out) / "logs"


def to_do(runs: list[Run]) -> list[Run]:
    """The runs that are not finished; prints how far each is."""
    states = {run.name: progress(run).state for run in runs}
    for name, state in states.items():
        print(f"{state:9s} {name}")
    return [run for run in runs if states[run.name] != "finished"]


def launch(launcher: Any, runs: list[Run], out: epath.Path, parallel: int) -> int:
    """Starts the runs; returns the exit status of the sweep."""
    by_name = {run.name: run for run in runs}
    commands = {run.name: command_of(launcher, run) for run in runs}  # before anything is written
    for run in runs:
        write_config(run)
        (run.workdir / EXIT_FILE).unlink(missing_ok=True)

    def ended(name: str, status: int) -> None:
        if launcher.follows:
            (by_name[name].workdir / EXIT_FILE).write_text(f"{status}\n")

    logs = log_folder(out)
    jobs = [Job(name, command, logs / f"{name}.log") for name, command in commands.items()]
    with Pool(parallel) as pool:
        statuses = pool.run(jobs, ended)
        stopped = pool.stopping
    if any(status not in (0, EXIT_STATUS) for status in statuses.values()):
        return 1
    return EXIT_STATUS if stopped else 0


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    if not _CONFIG.value and not _REPORT.value:
        raise app.UsageError("--config=FILE.py[:ARG] is needed, unless --report")
    out = epath.Path(_OUT.value)
    try:
        launcher = make_launcher(_LAUNCHER.value, _LAUNCH.value)
        runs = expand(_CONFIG.value, out) if _CONFIG.value else found_in(out)
        todo = to_do(runs)
        if _DRY_RUN.value:
            for run in todo:
                print(f"\n# {run.name}\n{describe(launcher, run)}", end="")
            return
        status = 0
        if not _REPORT.value:
            status = launch(launcher, todo, out, _PARALLEL.value)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(report.write(out, runs, _METRIC.value))
    sys.exit(status)


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    app.run(main)
