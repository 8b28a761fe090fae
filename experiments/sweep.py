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

import argparse
import pathlib
import shlex
import sys
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", default="", help="config file with sweep(add), FILE.py[:ARG]")
    parser.add_argument("--out", required=True, help="folder of the sweep, local or gs://")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where runs start")
    parser.add_argument("--launch", default="", help="options of the launcher, key=value,...")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="print what would be started")
    parser.add_argument("--report", action="store_true", help="only make the table")
    parser.add_argument("--metric", default="", help="what runs are compared by")
    flags = parser.parse_args()
    if not flags.config and not flags.report:
        parser.error("--config=FILE.py[:ARG] is needed, unless --report")
    if flags.parallel < 1:
        parser.error(f"--parallel={flags.parallel}: give at least 1")
    out, status = epath.Path(flags.out), 0
    try:
        launcher = make_launcher(flags.launcher, flags.launch)
        runs = expand(flags.config, out) if flags.config else found_in(out)
        todo = to_do(runs)
        if flags.dry_run:
            for run in todo:
                print(f"\n# {run.name}\n{describe(launcher, run)}", end="")
            return
        if not flags.report:
            status = launch(launcher, todo, out, flags.parallel)
        print(report.write(out, runs, flags.metric))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
