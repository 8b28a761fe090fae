"""Slurm: one batch job a run, which puts itself back into the queue after status 75."""

import dataclasses
import pathlib
import shlex

from experiments.launchers.command import resource_name, train_command
from experiments.sweeps.runs import Run

LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Options of --launch.

    Attributes:
      nodes: of a run; one process on each.
      gpus: on each node.
      cpus: of each process.
      time: limit, as Slurm writes it; the run goes on in a new job after it.
      partition, account: "" leaves them to the cluster.
      grace: seconds before the limit at which training is told to save.
      port: on the first node, where the processes meet.
      setup: file with a shell script that is run first on every node (modules, environment).
    """

    nodes: int = 1
    gpus: int = 8
    cpus: int = 16
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    grace: int = 120
    port: int = 12321
    setup: str = ""

    follows = False

    def script(self, run: Run) -> str:
        """The bash script that submits a run."""
        train = shlex.join(train_command(run))
        if self.nodes > 1:
            train += (
                f' --coordinator="$FIRST:{self.port}" --num_processes="$SLURM_NTASKS"'
                ' --process_id="$SLURM_PROCID"'
            )
        setup = pathlib.Path(self.setup).read_text().rstrip() + "\n" if self.setup else ""
        optional = [
            f"#SBATCH --{name}={value}\n"
            for name, value in (("partition", self.partition), ("account", self.account))
            if value
        ]
        return _SCRIPT.format(
            name=resource_name(run, LONGEST_NAME),
            log=f"{run.workdir}/slurm-%j.log",
            nodes=self.nodes,
            gpus=self.gpus,
            cpus=self.cpus,
            time=self.time,
            grace=self.grace,
            optional="".join(optional),
            inner=shlex.quote(f"{setup}exec {train}"),
        )


# --dependency=singleton: a run that is submitted twice waits for itself and then has nothing to do.
_SCRIPT = """\
sbatch --dependency=singleton <<'END_OF_JOB'
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --signal=B:TERM@{grace}
{optional}set -u
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c {inner} &
step=$!
trap 'kill -TERM "$step"' TERM
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done
echo "status $status"
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
END_OF_JOB
"""
