"""Joining the processes of a run."""

import os
import pathlib
import sys

import jax


def initialize_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes, if there are any; must run before anything else touches JAX.

    On a TPU pod and with the variables of JAX (JAX_COORDINATOR_ADDRESS, ...) nothing need be given.

    Args:
      coordinator: HOST:PORT of process 0.
    """
    given = (coordinator, num_processes, process_id)
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
