"""How long a save blocks the loop, how long it takes beside it, how long a restore takes.

    python -m experiments.benchmarks.checkpoint --work runs/checkpoint --megabytes 1024 \\
        --out experiments/results/benchmarks/checkpoint.json

Random float32 arrays of 64 MiB; they do not compress, as trained weights hardly do. What is
restored must be what was saved, bit for bit. The shortest interval between two saves is the time
until one is complete, checksums included: a save before that waits for it. With --on_host it is the
local tier that saves (config.checkpoint.local_dir), into WORK as well.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.local_checkpoints import LocalCheckpoints
from tpo_jax.training.save_policy import Save, SavePolicy

ARRAY_MEGABYTES = 64


MOST_BLOCKED, MOST_SHARE = 1.0, 0.03  # seconds, and of the shortest interval between saves


def measure(folder: pathlib.Path, megabytes: int, saves: int, on_host: bool) -> dict[str, Any]:
    """Wall and CPU seconds (of the median save) and bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    keys = jax.random.split(jax.random.key(0), megabytes // ARRAY_MEGABYTES)
    draw = jax.jit(lambda key: jax.random.normal(key, (ARRAY_MEGABYTES, 512, 512)))
    state = {f"leaf{i}": draw(key) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for n, x in state.items()}
    folder.mkdir(parents=True)

    def opened() -> Checkpoints:
        local = LocalCheckpoints(folder, epath.Path(folder), want, print) if on_host else None
        return Checkpoints(folder / "checkpoints", SavePolicy(every=1, keep=1), local)

    checkpoints, save = opened(), Save(("local" if on_host else "step",))
    blocked, complete, cpu = [], [], []
    for step in range(1, saves + 1):
        begin, worked = time.monotonic(), time.process_time()
        checkpoints.save(step, Checkpoint(state, {}, {}, {}, {}, {}), save)
        blocked.append(time.monotonic() - begin)
        checkpoints.wait()
        complete.append(time.monotonic() - begin)
        cpu.append(time.process_time() - worked)
    newest = folder.rglob(f"{saves}/**/*")
    size = sum(path.stat().st_size for path in newest if path.is_file())
    begin, worked = time.monotonic(), time.process_time()
    checkpoints = opened()
    restored = checkpoints.restore(checkpoints.latest(), want).state
    jax.block_until_ready(restored)
    restore = {"restore_seconds": time.monotonic() - begin,
               "restore_cpu_seconds": time.process_time() - worked}  # fmt: skip
    for name, leaf in state.items():
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(leaf), name)
    share = max(blocked) / min(complete)
    return {
        "state_bytes": sum(x.nbytes for x in state.values()),
        "file_bytes": size,
        "blocked_seconds": sorted(blocked)[saves // 2],
        "longest_blocked_seconds": max(blocked),
        "until_complete_seconds": sorted(complete)[saves // 2],
        "save_cpu_seconds": sorted(cpu)[saves // 2],
        "largest_share_of_shortest_interval": share,
        **restore,
        "targets": {"longest_blocked_seconds": MOST_BLOCKED,
                    "largest_share_of_shortest_interval": MOST_SHARE},
        "met": max(blocked) <= MOST_BLOCKED and share < MOST_SHARE,
        "saves": saves, "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "orbax-checkpoint")},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the files")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--on_host", action="store_true", help="measure the local tier")
    flags = parser.parse_args(arguments)
    result = measure(flags.work, flags.megabytes, flags.saves, flags.on_host)
    text = json.dumps(result, indent=2)
    print(text)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(text + "\n")
    shutil.rmtree(flags.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
