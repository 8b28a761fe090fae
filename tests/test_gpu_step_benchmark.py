"""The benchmark of a wide step in bfloat16, on a model and a device of which it says nothing."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import gpu_step
from experiments.benchmarks.layouts import as_rows
from experiments.benchmarks.train_step import Sizes
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel


def test_a_step_is_measured_against_the_peak_of_the_device(monkeypatch):
    monkeypatch.setattr(gpu_step, "peak_flops", lambda devices: 1e9)
    sizes = Sizes(rows=1, frames=2, answer=3)
    found = gpu_step.measure(preset("llava_onevision_tiny"), sizes, steps=2)
    assert found["MFU"] == pytest.approx(found["FLOPs a step"] / found["seconds a step"] / 1e9)
    assert found["met"] == (found["MFU"] >= 0.45)
    tokens = found["tokens a second"] * found["seconds a step"]
    # A token before and one behind the video, 2 x 2 of the patches of two frames and one newline.
    visual = preset("llava_onevision_tiny").num_visual_tokens(2)
    assert tokens == pytest.approx(2 + visual + 3 + 1, abs=1)
    assert found["attention"] == "xla" and found["loss"] > 0
    assert found["device"] == jax.devices()[0].device_kind


def test_pairs_are_measured_in_both_layouts_and_beside_sft(monkeypatch):
    """Which agree in the loss, or nothing is measured."""
    monkeypatch.setattr(gpu_step, "peak_flops", lambda devices: 1e9)
    config = preset("llava_onevision_tiny")
    sizes = Sizes(rows=2, frames=4, text=4, answer=3)
    found = gpu_step.measure_pairs(config, sizes, steps=2)
    steps = found["steps"]
    # A token behind the video, the question to it, and the token before each answer.
    prefix, branch = config.visual_offset + config.num_visual_tokens(4) + 1 + 4, 3 + 1
    tokens = {"shared": prefix + 2 * branch, "two_rows": 2 * (prefix + branch),
              "sft": prefix + branch}  # fmt: skip
    for name, each in steps.items():
        assert each["MFU"] == pytest.approx(each["FLOPs a step"] / each["seconds a step"] / 1e9)
        seen = each["tokens a second"] * each["seconds a step"]
        assert seen == pytest.approx(2 * tokens[name]), name
    flops = {name: each["FLOPs a step"] for name, each in steps.items()}
    # Whole frames and most of the prefix are encoded twice.
    assert 1.5 < flops["two_rows"] / flops["shared"] < 2 and flops["sft"] < flops["shared"]
    ratios = {row["ratio"]: row for row in found["ratios"]}
    assert ratios["two_rows / shared"]["FLOPs"] == flops["two_rows"] / flops["shared"]
    for row in ratios.values():
        assert row["quartiles"][0] <= row["wall"] <= row["quartiles"][1]
    one, other = found["losses before"]
    assert one == pytest.approx(other, rel=gpu_step.TOLERANCE) and one > 0
    assert found["met"] == (steps["shared"]["MFU"] >= 0.45)
    memory = [steps[name]["temporary GiB"] for name in ("shared", "two_rows")]
    assert found["temporary memory, shared / two_rows"] == memory[0] / memory[1] < 1


def test_rows_of_a_pair_are_its_branches_with_the_clip_of_each():
    batch = gpu_step.make_pairs(preset("llava_onevision_tiny"), Sizes(rows=2, frames=2, answer=3))
    rows = as_rows(batch)
    for name, x in batch.items():
        if name == "slots":
            continue
        of_branches = name.startswith(("branch_", "answer_", "reference_"))
        want = [x[i // 2, i % 2, None] if of_branches else x[i // 2] for i in range(4)]
        np.testing.assert_array_equal(rows[name], np.stack(want), err_msg=name)
    alone = gpu_step.chosen_alone(batch)
    assert alone["answer_tokens"].shape == (2, 1, 3) and "pair_valid" not in alone
    np.testing.assert_array_equal(alone["answer_tokens"][:, 0], batch["branch_tokens"][:, 0, 1:])


def test_the_stack_has_the_widths_of_the_7b_model_and_fits_a_gpu_of_80_gb():
    config, whole = gpu_step.stack(8, 2), preset("llava_onevision_7b")
    assert (config.language.width, config.language.mlp_width) == (3584, 18944)
    assert (config.language.depth, config.vision.depth) == (8, 2)
    assert config.connector == whole.connector and config.vision.width == whole.vision.width
    parameters = sum(x.size for x in jax.tree.leaves(FunctionalModel(config).abstract()))
    assert 2.9e9 < parameters < 3.1e9
    assert parameters * 16 < 50e9  # parameters, gradients and two moments in float32
