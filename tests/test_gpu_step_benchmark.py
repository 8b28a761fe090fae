"""The benchmark of a wide step in bfloat16, on a model and a device of which it says nothing."""

import jax
import pytest

from experiments.benchmarks import gpu_step
from experiments.benchmarks.train_step import Sizes
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel


@pytest.mark.long
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


def test_the_stack_has_the_widths_of_the_7b_model_and_fits_a_gpu_of_80_gb():
    config, whole = gpu_step.stack(8, 2), preset("llava_onevision_7b")
    assert (config.language.width, config.language.mlp_width) == (3584, 18944)
    assert (config.language.depth, config.vision.depth) == (8, 2)
    assert config.connector == whole.connector and config.vision.width == whole.vision.width
    parameters = sum(x.size for x in jax.tree.leaves(FunctionalModel(config).abstract()))
    assert 2.9e9 < parameters < 3.1e9
    assert parameters * 16 < 50e9  # parameters, gradients and two moments in float32
