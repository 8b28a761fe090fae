"""The benchmark of the supervised step on sizes that take seconds; its figures mean nothing."""

import jax
import pytest

from experiments.benchmarks import train_step

SIZES = train_step.Sizes(
    rows=1, frames=2, image=28, width=64, depth=1, vision_width=48, vision_depth=1, answer=3
)


@pytest.mark.long
@pytest.mark.parity
def test_both_take_the_same_steps_and_are_timed():
    pytest.importorskip("transformers")
    found = train_step.step_times(SIZES, rounds=2, threads=1)
    assert found["losses"]["ours"][2] < found["losses"]["ours"][0]
    assert found["losses"].keys() == {"ours", *train_step.usable_settings()}
    assert found["torch / ours, wall"]["median"] > 0


def test_a_step_that_does_nothing_is_dispatched():
    ours = train_step.Ours(SIZES)
    batch, _ = train_step.make_batches(ours, SIZES)
    found = train_step.dispatch_milliseconds(
        ours.program, ours.state, jax.device_put(batch), calls=5
    )
    assert 0 < found["median"] <= found["90 %"]
    assert found["leaves"] > len(jax.tree.leaves(batch))


def test_the_ratio_is_to_the_setting_that_is_fastest_in_its_time():
    found = {
        "ours": [(1.0, 2.0), (2.0, 2.0), (1.0, 2.0)],
        "eager": [(4.0, 3.0), (4.0, 5.0), (4.0, 4.0)],
        "torch.compile, fused AdamW": [(3.0, 6.0), (3.0, 6.0), (2.0, 6.0)],
    }
    rows = train_step.compared(found)
    wall, cpu = rows["torch / ours, wall"], rows["torch / ours, cpu"]
    assert (wall["baseline"], wall["median"]) == ("torch.compile, fused AdamW", 2.0)
    assert (cpu["baseline"], cpu["median"]) == ("eager", 2.0)
    assert rows["seconds, wall"]["torch.compile, fused AdamW"] == 3.0


def test_without_a_compiler_pytorch_stays_eager(monkeypatch):
    monkeypatch.setattr(train_step.shutil, "which", lambda name: None)
    assert train_step.usable_settings() == ["eager", "eager, fused AdamW"]
