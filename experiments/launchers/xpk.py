"""GKE clusters by xpk: one workload a run; the cluster starts it again after status 75."""

import dataclasses
import shlex

from experiments.launchers.command import require, require_shared, resource_name, train_command
from experiments.sweeps.runs import Run

LONGEST_NAME = 39  # of a workload


@dataclasses.dataclass(frozen=True)
class Xpk:
    """Options of --launch.

    Attributes:
      project, zone, cluster: where.
      tpu_type: such as v5litepod-16 or v4-32.
      image: Docker image that holds tpo_jax and its dependencies.
      num_slices: slices of one run.
      priority: of the workload.
      restarts: how often the cluster starts it again at most.
      grace: seconds between SIGTERM and SIGKILL.
    """

    project: str = ""
    zone: str = ""
    cluster: str = ""
    tpu_type: str = ""
    image: str = ""
    num_slices: int = 1
    priority: str = "medium"
    restarts: int = 1000
    grace: int = 120

    follows = False

    def script(self, run: Run) -> str:
        """The bash script that submits a run."""
        require(
            "xpk", project=self.project, zone=self.zone, cluster=self.cluster,
            tpu_type=self.tpu_type, image=self.image,
        )  # fmt: skip
        require_shared("xpk", run)
        # xpk restarts on 42 and on 127 to 255 by itself: a crash must not look like one of them.
        # `exec` is not possible then, so the signal is passed on.
        inside = (
            f"{shlex.join(train_command(run))} & pid=$!; trap 'kill -TERM $pid' TERM; "
            "while wait $pid; status=$?; kill -0 $pid 2>/dev/null; do :; done; "
            "case $status in 0|75) exit $status ;; *) exit 1 ;; esac"
        )
        command = [
            f"--workload={resource_name(run, LONGEST_NAME)}",
            f"--project={self.project}", f"--zone={self.zone}", f"--cluster={self.cluster}",
            f"--tpu-type={self.tpu_type}", f"--num-slices={self.num_slices}",
            f"--docker-image={self.image}", f"--priority={self.priority}",
            f"--max-restarts={self.restarts}", "--restart-on-exit-codes=75",
            f"--termination-grace-period-seconds={self.grace}",
            f"--command={inside}",
        ]  # fmt: skip
        lines = ["xpk workload create", *map(shlex.quote, command)]
        return " \\\n  ".join(lines) + "\n"
