"""Seeds one by one against seeds in one program, at the size of the micro model."""

import jax
import numpy as np
import pytest
from fake_batches import bucket, micro, train_config

from experiments.benchmarks import vmapped_seeds
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.program import make_program


def test_seeds_train_alike_in_one_program_and_the_ratio_is_a_seed(monkeypatch):
    heads = ("region",)
    mesh = make_mesh({}, jax.devices()[:1])
    config = train_config(heads)
    config.optimizer.warmup = 0.0
    program = make_program(config, micro(heads), mesh)
    times = {"one": [(1.0, 2.0)] * 3, "vmapped": [(1.5, 3.0), (1.8, 9.0), (6.0, 12.0)]}
    timed = []

    def measure(runs, rounds):
        timed.append({name: run().shape for name, run in runs.items()})
        return times

    monkeypatch.setattr(vmapped_seeds, "measure", measure)
    shape = bucket(2, slots={"region": 2})
    found = vmapped_seeds.compare(program, shape, seeds=3, rounds=3)
    assert timed == [{"one": (), "vmapped": (3,)}]
    assert found["vmapped a seed / one"] == pytest.approx({"wall": 1.8 / 3, "cpu": 4.5 / 3})
    assert found["seconds"]["vmapped"] == {"wall": 1.8, "cpu": 9.0}
    # Every seed learns, from weights and rows of its own.
    losses = np.array(found["losses"])
    assert losses.shape == (3, 3) and len(set(losses[0])) == 3
    assert np.all(np.isfinite(losses)) and np.all(losses[2] < losses[0])
    assert min(found["seconds, compile"]["vmapped"].values()) > 0
