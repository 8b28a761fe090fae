"""TPU VMs by queued resources: a script a run waits for a slice, trains and gives it back.

The script runs here and talks to the slice with gcloud. It starts training again after status 75,
on the same slice if that is still there, on a new one otherwise. A slice that was taken away before
it could report a status counts as 75; any other status ends the run.
"""

import dataclasses
import pathlib
import shlex

from experiments.launchers.command import require, require_shared, resource_name, train_command
from experiments.sweeps.runs import Run

LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class QueuedResources:
    """Options of --launch.

    Attributes:
      project, zone: of Google Cloud.
      accelerator: such as v5litepod-16 or v4-32.
      runtime: image of the VMs, such as v2-alpha-tpuv5-lite.
      spot: may be taken away, and is cheaper.
      directory: where the repository is on the VMs, in the home folder.
      setup: file with a shell script that every VM runs before the first training.
      poll: seconds between two looks at the state.
    """

    project: str = ""
    zone: str = ""
    accelerator: str = ""
    runtime: str = ""
    spot: bool = True
    directory: str = "tpo_jax"
    setup: str = ""
    poll: int = 30

    follows = True

    def script(self, run: Run) -> str:
        """The bash script of a run."""
        require(
            "queued_resources", project=self.project, zone=self.zone,
            accelerator=self.accelerator, runtime=self.runtime,
        )  # fmt: skip
        require_shared("queued_resources", run)
        train = f"cd {shlex.quote(self.directory)} && {shlex.join(train_command(run))}"
        setup = pathlib.Path(self.setup).read_text() if self.setup else "true"
        return _SCRIPT.format(
            name=resource_name(run, LONGEST_NAME),
            project=shlex.quote(self.project),
            zone=shlex.quote(self.zone),
            accelerator=shlex.quote(self.accelerator),
            runtime=shlex.quote(self.runtime),
            spot=" --spot" if self.spot else "",
            setup=shlex.quote(setup),
            train=shlex.quote(train),
            poll=self.poll,
        )


_SCRIPT = """\
set -uo pipefail
name={name}
where=(--project={project} --zone={zone} --quiet)
tpus=(gcloud compute tpus)
stopping=

state() {{ "${{tpus[@]}}" queued-resources describe "$name" "${{where[@]}}" \\
  --format='value(state.state)' 2>/dev/null; }}
release() {{ "${{tpus[@]}}" queued-resources delete "$name" "${{where[@]}}" --force; }}
on_workers() {{ "${{tpus[@]}}" tpu-vm ssh "$name" "${{where[@]}}" --worker=all --command="$1"; }}

acquire() {{
  "${{tpus[@]}}" queued-resources create "$name" --node-id="$name" "${{where[@]}}" \\
    --accelerator-type={accelerator} --runtime-version={runtime}{spot} || return
  while [ -z "$stopping" ]; do
    case "$(state)" in
      ACTIVE) on_workers {setup}; return ;;
      FAILED) echo "$name: the request failed" >&2; return 1 ;;
      SUSPENDED) return 75 ;;
    esac
    sleep {poll}
  done
  return 75
}}

# Training saves and ends with 75; the loop below then ends as well.
stop() {{ stopping=1; on_workers 'pkill -TERM -f tpo_jax.train'; }}
trap stop TERM INT
trap release EXIT

while [ -z "$stopping" ]; do
  status=0
  [ "$(state)" = ACTIVE ] || {{ release 2>/dev/null; acquire; status=$?; }}
  if [ "$status" -eq 0 ]; then
    on_workers {train} &
    training=$!
    while wait "$training"; status=$?; kill -0 "$training" 2>/dev/null; do :; done
    # A signal interrupts `wait`; if training has ended meanwhile, its own status is still there.
    [ -z "$stopping" ] || [ "$status" -le 128 ] || {{ wait "$training"; status=$?; }}
    [ "$status" -eq 75 ] || [ "$(state)" = ACTIVE ] || status=75  # taken away without a word
  fi
  echo "$name: status $status"
  [ "$status" -eq 75 ] || exit "$status"
done
exit 75
"""
