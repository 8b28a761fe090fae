"""The benchmark of the supervised step on sizes that take seconds; its figures mean nothing."""

import jax
import pytest

from experiments import plans
from experiments.benchmarks import torch_settings, train_step

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
    assert found["seconds, first step"].keys() == found["losses"].keys()
    assert min(*found["seconds, first step"].values(), *found["seconds, compile"].values()) > 0


def test_programs_are_lowered_and_compiled_one_after_the_other():
    clock, done = iter([10.0, 12.0, 17.0]), []

    class Lowered:
        def compile(self):
            done.append("compile")
            return "program"

    def lower():
        done.append("lower")
        return [Lowered(), Lowered()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step.time, "perf_counter", lambda: next(clock))
        programs, seconds = train_step.timed_compile(lower)
    assert done == ["lower", "compile", "compile"] and programs == ["program"] * 2
    assert seconds == {"lower": 2.0, "compile": 5.0}


def test_first_steps_are_timed_once_and_losses_that_differ_are_refused(monkeypatch):
    clock = iter([0.0, 3.0, 4.0, 11.0, 0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: next(clock))
    same = {name: iter([3.0, 2.0, 1.0]).__next__ for name in ("ours", "eager")}
    assert train_step.agree(same) == {
        "losses": {"ours": [3.0, 2.0, 1.0], "eager": [3.0, 2.0, 1.0]},
        "seconds, first step": {"ours": 3.0, "eager": 7.0},
    }
    with pytest.raises(AssertionError, match="losses differ"):
        train_step.agree({"ours": lambda: 1.0, "eager": lambda: 1.01})


def test_compile_times_are_a_table_of_what_was_measured():
    step = {"seconds, compile": {"lower": 1.0, "compile": 2.5},
            "seconds, first step": {"ours": 0.25, "eager": 0.5}}  # fmt: skip
    found = {"step": {"result": step},
             "compile": {"result": {"longva": {"lower": 3.0, "compile": 4.0},
                                    "videochat_tpo": {"lower": 5.0, "compile": 6.0}}}}  # fmt: skip
    assert train_step.compile_table(found).splitlines()[2:] == [
        "| ours | 1.00 | 2.50 | 0.25 |", "| eager |  |  | 0.50 |",
        "| configs/longva.py:tiny | 3.00 | 4.00 |  |",
        "| configs/videochat_tpo.py:stage=3,random,tiny | 5.00 | 6.00 |  |",
    ]  # fmt: skip
    assert train_step.compile_table({"memory": {}}) == ""


def test_every_config_of_full_size_has_a_tiny_one_to_compile(monkeypatch):
    assert train_step.CONFIGS.keys() == {cell.config for cell in plans.cells()}
    monkeypatch.setattr(train_step, "timed_compile", lambda lower: (lower, {"compile": 0.0}))
    for name, arg in train_step.CONFIGS.items():
        assert train_step.compile_seconds(name, arg) == {"compile": 0.0}, name


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
    monkeypatch.setattr(torch_settings.shutil, "which", lambda name: None)
    assert train_step.usable_settings() == ["eager", "eager, fused AdamW"]
