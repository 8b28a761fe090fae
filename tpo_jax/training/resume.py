"""Where a run goes on, and whether it may."""

from collections.abc import Callable
from typing import Any

from etils import epath

from tpo_jax.training import agreement
from tpo_jax.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
)
from tpo_jax.training.config_changes import changed_since


def find_start(checkpoints: Checkpoints, resume_from: int | None) -> int | None:
    """Step to go on from: the newest complete one, or that of --resume_from."""
    if resume_from is None:
        return checkpoints.latest()
    if resume_from not in checkpoints.steps():
        raise CheckpointError(
            f"--resume_from={resume_from}: no complete checkpoint in {checkpoints.directory}; "
            f"there are {checkpoints.steps()}"
        )
    return resume_from


def read_checkpoint(checkpoints: Checkpoints, step: int) -> Checkpoint:
    """All but the state; a damaged checkpoint is refused with the one to go on from instead."""
    try:
        return checkpoints.read(step)
    except DamagedCheckpoint as error:
        older = checkpoints.newest_good(step)
        if older is None:
            advice = "No older one is good: start anew in another --workdir."
        else:
            advice = (
                f"The newest good one before it is of step {older}: go on from there with "
                f"--resume_from={older} (newer ones are set aside, not removed)."
            )
        raise DamagedCheckpoint(f"{error}\n{advice}") from error


def check_same_run(
    workdir: epath.Path,
    saved: Checkpoint,
    config: Any,
    identity: dict[str, Any],
    new_mixture: bool,
    say: Callable[[str], None],
) -> None:
    """Refuses to resume a run under a config, data or random settings that would change it.

    Args:
      identity: of this process, from agreement.identity.
      new_mixture: whether data.train may differ.
      say: told of what differs and may.
    """
    changed = changed_since(saved.config, config)
    mixture = [line for line in changed if line.startswith("data.train")]
    if new_mixture:
        changed = [line for line in changed if line not in mixture]
    forbidden, told = agreement.changes(saved.identity, identity)
    if changed or forbidden:
        hint = ""
        if mixture and len(mixture) == len(changed):
            hint = "\nIf the sources are meant to change from here on: --new_mixture."
        raise CheckpointError(
            f"{workdir}: holds a run with another config:\n  "
            + "\n  ".join([*changed, *forbidden])
            + "\nGive the same options to resume it, or another --workdir to start a new run."
            + hint
        )
    for line in [*told, *(mixture if new_mixture else ())]:
        say(f"differs from the checkpoint: {line}")
