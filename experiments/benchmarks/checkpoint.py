"""How long a save blocks the loop, how long it takes beside it, how long a restore takes.

    python -m experiments.benchmarks.checkpoint --work runs/checkpoint --megabytes 1024 \\
        --out experiments/results/benchmarks/checkpoint.json

Random float32 arrays of 64 MiB; they do not compress, as trained weights hardly do. What is
restored must be what was saved, bit for bit. With --on_host it is the local tier that saves
(config.checkpoint.local_dir), into WORK as well.

Saves are measured in turn in two ways. In a loop: after a save comes a step as `train` does it, a
stand-in for the gradient (matrix products on all cores for about --gradient seconds), then an
update that takes over the memory of the state. The save blocks while it is called, and while the
update still has to wait for it when the gradient is done. Alone: nothing else runs, which gives the
time until a save is complete, checksums included (a save before that waits for it: the shortest
interval), and the time until the state may be overwritten (a gradient as long hides the copy).
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.benchmarks import command_line
from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.save_policy import Save, SavePolicy

ARRAY_MEGABYTES = 64
MOST_BLOCKED, MOST_SHARE = 1.0, 0.03  # seconds, and of the shortest interval between saves

State = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SaveTime:
    """Seconds of one save.

    blocked: of the loop. complete: until files and checksums are written. cpu: of the process, till
    then. gradient: how long that took, 0 without one.
    """

    blocked: float
    complete: float
    cpu: float
    gradient: float


def make_state(step: int, megabytes: int) -> State:
    """Another one for each step."""
    keys = jax.random.split(jax.random.key(step), megabytes // ARRAY_MEGABYTES)
    draw = jax.jit(lambda key: jax.random.normal(key, (ARRAY_MEGABYTES, 512, 512)))
    return jax.block_until_ready({f"leaf{i}": draw(key) for i, key in enumerate(keys)})


def make_gradient(seconds: float) -> Callable[[], jax.Array]:
    """A function that starts matrix products which take about `seconds` when nothing else runs."""
    square = jnp.eye(1024)
    products = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x))
    jax.block_until_ready(products(1, square))
    begin = time.monotonic()
    jax.block_until_ready(products(8, square))
    count = max(1, round(8 * seconds / (time.monotonic() - begin)))
    return lambda: products(count, square)


def time_gradient(gradient: Callable[[], jax.Array]) -> float:
    begin = time.monotonic()
    jax.block_until_ready(gradient())
    return time.monotonic() - begin


@functools.partial(jax.jit, donate_argnums=0)
def update(state: State) -> State:
    return jax.tree.map(lambda x: 0.5 * x, state)


def time_save(
    checkpoints: Checkpoints,
    step: int,
    state: State,
    kind: str,
    gradient: Callable[[], jax.Array] | None,
) -> SaveTime:
    """One save; with a `gradient` the step after it, which overwrites `state`."""
    begin, worked, took = time.monotonic(), time.process_time(), 0.0
    checkpoints.save(step, Checkpoint(state, {}, {}, {}, {}, {}), Save((kind,)))
    blocked = time.monotonic() - begin
    if gradient is not None:
        took = time_gradient(gradient)
    start = time.monotonic()
    checkpoints.wait_for_copy()
    blocked += time.monotonic() - start
    if gradient is not None:
        jax.block_until_ready(update(state))
    checkpoints.wait()
    return SaveTime(blocked, time.monotonic() - begin, time.process_time() - worked, took)


def measure(
    folder: pathlib.Path, megabytes: int, saves: int, on_host: bool, seconds: float
) -> dict[str, Any]:
    """Wall and CPU seconds, and bytes; see the module. `seconds`: of a gradient."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
            for name, leaf in make_state(0, megabytes).items()}  # fmt: skip

    def opened() -> Checkpoints:
        local = LocalCheckpoints(folder, epath.Path(folder), want, print) if on_host else None
        return Checkpoints(folder / "checkpoints", SavePolicy(every=1, keep=1), local)

    gradient = make_gradient(seconds)
    checkpoints, kind = opened(), "local" if on_host else "step"
    alone, in_loop, undisturbed = [], [], []
    for step in range(2, 2 * saves + 1, 2):
        state = make_state(step - 1, megabytes)
        alone.append(time_save(checkpoints, step - 1, state, kind, None))
        undisturbed.append(time_gradient(gradient))
        in_loop.append(time_save(checkpoints, step, make_state(step, megabytes), kind, gradient))
    files = [path for path in folder.rglob(f"{2 * saves}/**/*") if path.is_file()]
    return {
        "state_bytes": megabytes * 2**20,
        "file_bytes": sum(path.stat().st_size for path in files),
        **summary(alone, in_loop),
        "gradient_seconds": {"undisturbed": statistics.median(undisturbed),
                             "beside_a_save": statistics.median(s.gradient for s in in_loop)},
        **time_restore(opened, want, make_state(2 * saves, megabytes)),
        "saves": saves, "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "orbax-checkpoint")},
    }  # fmt: skip


def summary(alone: list[SaveTime], in_loop: list[SaveTime]) -> dict[str, Any]:
    """Medians and extremes, and whether the targets are met."""
    longest = max(save.blocked for save in in_loop)
    share = longest / min(save.complete for save in alone)
    return {
        "blocked_seconds": statistics.median(save.blocked for save in in_loop),
        "longest_blocked_seconds": longest,
        "until_copied_alone_seconds": statistics.median(save.blocked for save in alone),
        "until_complete_seconds": statistics.median(save.complete for save in alone),
        "save_cpu_seconds": statistics.median(save.cpu for save in alone),
        "largest_share_of_shortest_interval": share,
        "targets": {"longest_blocked_seconds": MOST_BLOCKED,
                    "largest_share_of_shortest_interval": MOST_SHARE},
        "met": longest <= MOST_BLOCKED and share < MOST_SHARE,
    }  # fmt: skip


def time_restore(
    opened: Callable[[], Checkpoints], want: dict[str, jax.ShapeDtypeStruct], saved: State
) -> dict[str, float]:
    """Of the newest checkpoint, which has to be `saved`."""
    begin, worked = time.monotonic(), time.process_time()
    checkpoints = opened()
    restored = jax.block_until_ready(checkpoints.restore(checkpoints.latest(), want).state)
    found = {"restore_seconds": time.monotonic() - begin,
             "restore_cpu_seconds": time.process_time() - worked}  # fmt: skip
    for name, leaf in saved.items():
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(leaf), name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.make_parser("checkpoint", __doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the files")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--saves", type=int, default=3, help="of each of the two ways")
    parser.add_argument("--gradient", type=float, default=1.0, help="seconds")
    parser.add_argument("--on_host", action="store_true", help="measure the local tier")
    flags = parser.parse_args(arguments)
    result = measure(flags.work, flags.megabytes, flags.saves, flags.on_host, flags.gradient)
    print(command_line.write_record(flags.out, result))
    shutil.rmtree(flags.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
