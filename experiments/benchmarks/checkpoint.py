"""How long a save blocks the loop, how long it takes beside it, how long a restore takes.

    python -m experiments.benchmarks.checkpoint --out runs/checkpoint --megabytes 1024

Random float32 arrays of 64 MiB; they do not compress, as trained weights hardly do.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time

import jax

from tpo_jax.training.checkpoint import Checkpoint, Checkpoints
from tpo_jax.training.save_policy import Save, SavePolicy

ARRAY_MEGABYTES = 64


def measure(out: pathlib.Path, megabytes: int, saves: int) -> dict[str, float]:
    """Seconds (of the median save) and bytes."""
    shutil.rmtree(out, ignore_errors=True)
    keys = jax.random.split(jax.random.key(0), megabytes // ARRAY_MEGABYTES)
    draw = jax.jit(lambda key: jax.random.normal(key, (ARRAY_MEGABYTES, 512, 512)))
    state = {f"leaf{i}": draw(key) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    checkpoints = Checkpoints(out, SavePolicy(every=1, keep=1))
    blocked, beside = [], []
    for step in range(1, saves + 1):
        begin = time.monotonic()
        checkpoints.save(step, Checkpoint(state, {}, {}, {}, {}, {}), Save(("step",)))
        blocked.append(time.monotonic() - begin)
        checkpoints.wait()
        beside.append(time.monotonic() - begin)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for n, x in state.items()}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    begin = time.monotonic()
    restored = Checkpoints(out, SavePolicy(every=1, keep=1)).restore(saves, want).state
    jax.block_until_ready(restored)
    return {
        "state_bytes": sum(x.nbytes for x in state.values()),
        "file_bytes": size,
        "blocked_seconds": sorted(blocked)[saves // 2],
        "until_complete_seconds": sorted(beside)[saves // 2],
        "restore_seconds": time.monotonic() - begin,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.checkpoint",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--saves", type=int, default=3)
    flags = parser.parse_args(arguments)
    print(json.dumps(measure(flags.out, flags.megabytes, flags.saves), indent=2))
    shutil.rmtree(flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
