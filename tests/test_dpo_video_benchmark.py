"""The benchmark of the preference step on videos, in seconds; its figures mean nothing."""

import math

import numpy as np
import pytest

from experiments.benchmarks import dpo_video

SIZES = dpo_video.Sizes(
    rows=1, frames=4, image=56, width=64, depth=1, head_dim=32, vision_width=48, vision_depth=1,
    text=6, answer=3,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parity
def test_all_programs_agree_and_every_ratio_is_reported():
    settings = ["eager", "eager, fused AdamW"]  # compiling takes minutes
    result = dpo_video.run(SIZES, 2, threads=1, settings=settings, unroll=True)
    sides = {f"{layout}: {name}" for layout in dpo_video.LAYOUTS for name in settings}
    assert set(result["largest_difference"]) == sides
    assert set(result["losses"]) == {"ours", *sides}
    first, _, third = result["losses"]["ours"]
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert first - third > 3 * dpo_video.train_step.TOLERANCE  # or agreement would say nothing
    rows = {row["ratio"]: row for row in result["ratios"]}
    assert set(rows) == set(dpo_video.RATIOS)
    for row in rows.values():
        assert all(math.isfinite(row[kind]) and row[kind] > 0 for kind in ("wall", "cpu", "flops"))
    flops = result["flops"]
    # Of a frozen tower one pass: two rows of policy and reference make four, or share one.
    assert flops["published"] - flops["once"] > 3 * flops["tower"]
    assert flops["once"] < flops["once_cached"] + flops["once_score"]
    assert flops["shared"] < flops["once_cached"] < flops["published_cached"]
    for layout in dpo_video.LAYOUTS:
        assert result["setting"][layout].endswith(tuple(settings))
        assert set(result["settings"][layout]) <= sides


@pytest.mark.parity
def test_a_side_that_sees_another_video_is_refused():
    pytest.importorskip("transformers")
    weights = dpo_video.draw_weights(SIZES)
    ours = dpo_video.Ours(SIZES, weights)
    batch, arrays = dpo_video.make_batches(ours, SIZES)
    offset = ours.model_config.visual_offset
    side = dpo_video.Torch(SIZES, weights, offset, "once", "eager")
    tensors = {name: side.torch.from_numpy(x) for name, x in arrays.items()}
    found = dpo_video.check(ours, {"once": side}, batch, tensors)
    assert found["once"] <= dpo_video.TOLERANCE
    tensors["pixels"] = side.torch.from_numpy(np.flip(arrays["pixels"], 1).copy())
    with pytest.raises(AssertionError, match="once differs by .* nats"):
        dpo_video.check(ours, {"once": side}, batch, tensors)
    side.trained = side.trained[1:]
    with pytest.raises(AssertionError, match="once trains .* numbers, ours"):
        dpo_video.check(ours, {"once": side}, batch, tensors)


def test_jax_on_another_device_than_pytorch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("sys.argv", ["dpo_video", f"--out={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit, match="JAX runs on 'gpu' and PyTorch on the CPU.*JAX_PLATFORMS"):
        dpo_video.main()
