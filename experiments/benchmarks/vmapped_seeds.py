"""Does a step of several seeds in one program take less time a seed than a step of one?

    python -m experiments.benchmarks.vmapped_seeds \\
        --out experiments/results/benchmarks/vmapped_seeds.json

Model and shapes are those of the studies: the shipped base with its heads and the video bucket of
configs/task_preference.py:arm=heads. `one` is forward, backward and update of one seed, `vmapped`
jax.vmap of that over seeds with their own weights, random rows and keys. Rounds time both in
turning order; "vmapped a seed / one" is taken within a round, the median reported: below 1 one
program of all seeds is faster. Before, three steps of all seeds must have the losses that they have
alone (the first may be at a rate of 0).
"""

from __future__ import annotations

import functools
import runpy
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import command_line
from experiments.benchmarks.dpo_step import measure, medians
from experiments.benchmarks.train_step import timed_compile
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.evaluation.summary import describe_device, versions
from tpo_jax.parallel.mesh import make_mesh, on_mesh
from tpo_jax.parallel.paths import map_with_path
from tpo_jax.training.program import Program, make_program
from tpo_jax.training.start import make_model_config
from tpo_jax.training.step import make_gradient_step, make_update_step

CONFIG = "configs/task_preference.py"
TOLERANCE = 1e-3  # relative, of losses


def random_batch(bucket: Bucket, program: Program, seed: int) -> Any:
    """Every frame, token and slot is there; targets are blank."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        name = path.split("/")[-1]
        if name == "frames":
            return rng.integers(0, 256, leaf.shape, np.uint8)
        if name.endswith("_tokens"):
            return rng.integers(1, 200, leaf.shape, np.int32)
        there = leaf.dtype == bool or name.endswith(("_segments", "answer_weights"))
        return np.full(leaf.shape, there, leaf.dtype)

    return map_with_path(draw, batch_spec(bucket, program.model.config))


def compare(program: Program, bucket: Bucket, seeds: int, rounds: int) -> dict[str, Any]:
    """Seconds of `one` step and of one of all `seeds`; raises where their losses differ."""
    gradient = make_gradient_step(program.model, program.objective, program.optimizer)
    update = make_update_step(program.optimizer)

    def step(state: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        gradients, sums = gradient(state, batch, key)
        return update(state, gradients, sums["loss"])[0], sums["loss"].mean()

    own = [  # state, batch and key of each seed
        [program.init_state(program.init_params(seed)), random_batch(bucket, program, seed),
         program.base_key(seed)] for seed in range(seeds)
    ]  # fmt: skip
    together = jax.tree.map(lambda *x: jnp.stack(x), *own)
    compiled, compiling = {}, {}
    for name, function, given in (("one", step, own[0]), ("vmapped", jax.vmap(step), together)):
        lower = jax.jit(on_mesh(function, program.mesh), donate_argnums=0).lower
        compiled[name], compiling[name] = timed_compile(lambda: [lower(*given)])  # noqa: B023

    def run(name: str, given: list) -> np.ndarray:
        given[0], loss = compiled[name][0](*given)
        return np.asarray(loss)  # waits for the step

    alone = [[run("one", given) for given in own] for _ in range(3)]
    losses = [run("vmapped", together) for _ in range(3)]
    if not np.allclose(alone, losses, rtol=TOLERANCE, atol=0.0):
        raise AssertionError(f"losses of three steps differ: alone {alone}, vmapped {losses}")
    given = {"one": own[0], "vmapped": together}
    found = measure({n: functools.partial(run, n, x) for n, x in given.items()}, rounds)
    both = list(zip(found["vmapped"], found["one"], strict=True))
    ratio = {kind: statistics.median(v[i] / o[i] for v, o in both) / seeds
             for i, kind in enumerate(("wall", "cpu"))}  # fmt: skip
    return {"seeds": seeds, "rounds": rounds, "losses": np.array(losses).tolist(),
            "vmapped a seed / one": ratio, "seconds": medians(found),
            "seconds, compile": compiling}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line.make_parser("vmapped_seeds", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args(arguments)
    config = runpy.run_path(CONFIG)["get_config"]("arm=heads")
    program = make_program(
        config, make_model_config(config)[0], make_mesh({}, jax.devices()[:1])
    )
    bucket = Bucket.from_config("video", config.buckets.video.to_dict())
    record = {"device": describe_device(), "versions": versions(), "rows": bucket.batch_size}
    record |= compare(program, bucket, flags.seeds, flags.rounds)
    print(command_line.write_record(flags.out, record))


if __name__ == "__main__":
    main()
