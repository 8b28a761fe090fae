"""Joining the processes of a run, and what they have to agree on."""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes, if there are any; must run before anything else touches JAX.

    On a TPU pod nothing need be given.

    Args:
      coordinator: HOST:PORT of process 0; None: JAX_COORDINATOR_ADDRESS.
      num_processes, process_id: None: JAX_NUM_PROCESSES and JAX_PROCESS_ID, which JAX itself reads
        only from the launchers that it knows.
    """
    given = (
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _number(num_processes, "JAX_NUM_PROCESSES"),
        _number(process_id, "JAX_PROCESS_ID"),
    )
    on_tpu = any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio").exists()
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu"
    if given != (None, None, None):
        jax.distributed.initialize(*given)
    elif on_tpu and not cpu_only:  # a TPU VM finds its pod by itself
        jax.distributed.initialize()
    # Every process says that it is there: a host that does not start is otherwise a silent hang.
    print(
        f"process {jax.process_index()} of {jax.process_count()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def say(text: str) -> None:
    """Prints once, by process 0."""
    if jax.process_index() == 0:
        print(text)


def of_process_0(data: bytes) -> bytes:
    """The bytes that process 0 passes, on every process; the others may pass any."""
    if jax.process_count() == 1:
        return data
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    if not length:
        return b""
    size = 1 << length.bit_length()  # few sizes, because each compiles
    sent = data.ljust(size, b"\0") if jax.process_index() == 0 else bytes(size)
    whole = multihost_utils.broadcast_one_to_all(np.frombuffer(sent, np.uint8))
    return whole.tobytes()[:length]


def _number(given: int | None, variable: str) -> int | None:
    if given is None and variable in os.environ:
        return int(os.environ[variable])
    return given
