"""Where the time of one gradient goes: what compiles it, and what runs in it.

    python -m experiments.profile_step --config=configs/demo.py:stage=2 --bucket=video

Compiles the gradient that `python -m tpo_jax.train` computes for one bucket, runs it on a blank
batch and prints the seconds of the compiler's passes (sums over its threads; passes contain
others), and the milliseconds of the largest operations; the same for the update that all buckets
share with --bucket=update. Reads no data. `init_from` must be a model folder with the sizes; its
weights are not loaded.
"""

import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training import config as training_config
from tpo_jax.training.config_flag import define_config
from tpo_jax.training.program import make_program
from tpo_jax.training.start import make_model_config

define_config("config")
_BUCKET = flags.DEFINE_string("bucket", None, "Name in config.buckets, or update.")
_STEPS = flags.DEFINE_integer("steps", 3, "Runs to time, after one that is not timed.")
_TOP = flags.DEFINE_integer("top", 25, "Lines of each table.")


def traced(function: Callable[[], Any]) -> tuple[Any, dict[str, tuple[float, int]]]:
    """What `function` returns, and {event: (seconds over all threads, count)} of its trace."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = function()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    seconds: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.split("#")[0]
                if not name.startswith("$"):  # a Python function
                    seconds[name] += event.duration_ns / 1e9
                    counts[name] += 1
    return result, {name: (value, counts[name]) for name, value in seconds.most_common()}


def operations(text: str) -> dict[str, str]:
    """{instruction: shape and the name that it has in JAX} of a compiled program."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+)", line):
            origin = re.search(r'op_name="([^"]*)"', line)
            found[match[1]] = f"{match[2]}  {origin[1] if origin else ''}"
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; see --help")
    config = flags.FLAGS.config
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, make_mesh(config.mesh.to_dict()))
    found = read_buckets(training_config.to_dict(config)["buckets"], codec)
    buckets = {bucket.name: bucket for bucket in found}
    if _BUCKET.value == "update":
        lowered = program.lower_update()
    elif _BUCKET.value in buckets:
        lowered = program.lower_gradient(batch_spec(buckets[_BUCKET.value], model_config))
    else:
        known = ", ".join([*buckets, "update"])
        raise app.UsageError(f"--bucket={_BUCKET.value}: expected one of {known}")
    begin = time.monotonic()
    compiled, passes = traced(lowered.compile)
    text = compiled.as_text()
    print(
        f"compiled in {time.monotonic() - begin:.1f} s: {len(re.findall(' fusion[(]', text))} "
        f"fusions, {len(re.findall(' dot[(]', text))} products"
    )
    for name, (seconds, count) in list(passes.items())[: _TOP.value]:
        print(f"{seconds:8.2f} s {count:7d}  {name}")

    state = program.init_state(program.init_params(0))

    def arguments() -> Any:
        """New ones for every call: the update takes over its memory."""
        own, *others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lowered.args_info[0])
        return jax.tree.map(jnp.copy, state), *others

    jax.block_until_ready(compiled(*arguments()))
    given = jax.block_until_ready([arguments() for _ in range(_STEPS.value)])

    def run() -> None:
        jax.block_until_ready([compiled(*each) for each in given])

    begin = time.monotonic()
    _, events = traced(run)
    known = operations(text)
    print(f"\n{(time.monotonic() - begin) / _STEPS.value:.2f} s a run, with the profiler")
    shown = [(name, seconds) for name, (seconds, _) in events.items() if name in known]
    for name, seconds in shown[: _TOP.value]:
        print(f"{1e3 * seconds / _STEPS.value:8.1f} ms  {name}  {known[name]}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "bucket"])
    app.run(main)
