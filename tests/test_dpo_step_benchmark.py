"""The benchmark of the preference step on sizes that take seconds; its figures mean nothing."""

import math

import pytest

from experiments.benchmarks import dpo_step


@pytest.mark.long
@pytest.mark.parity
def test_all_programs_agree_and_every_ratio_is_reported():
    sizes = dpo_step.Sizes(pairs=1, frames=4, tokens_per_frame=8, text=6, answer=3)
    settings = ["eager", "eager, fused AdamW"]  # compiling takes minutes
    result = dpo_step.run(sizes, dpo_step.model_config(64, 1), 2, threads=1, settings=settings)
    assert list(result["settings"]) == settings
    assert result["setting"].endswith(tuple(result["settings"]))
    assert set(result["largest_difference"]) == {"shared", "two_rows", "torch"}
    assert {row["ratio"] for row in result["ratios"]} == set(dpo_step.RATIOS)
    for row in result["ratios"]:
        assert all(math.isfinite(row[kind]) and row[kind] > 0 for kind in ("wall", "cpu", "flops"))
    assert result["prefix_over_branch"] == 38 / 4
    tokens = (38 + 2 * 4) / (2 * (38 + 4))
    assert result["memory"]["tokens"] == pytest.approx(tokens)
    # Twice the rows of nearly all positions.
    (ratio,) = [r["flops"] for r in result["ratios"] if r["ratio"] == "two_rows / shared"]
    assert 1.5 < ratio < 2.0 and result["memory"]["shared / two_rows"] < 1


def test_jax_on_another_device_than_pytorch_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("sys.argv", ["dpo_step", f"--out={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit, match="JAX runs on 'gpu' and PyTorch on the CPU.*JAX_PLATFORMS"):
        dpo_step.main()


def test_the_baseline_is_the_setting_with_the_lowest_wall_time(monkeypatch):
    times = {"eager": [(4.0, 1.0), (5.0, 1.0), (9.0, 1.0)], "compiled": [(3.0, 6.0)] * 3}
    monkeypatch.setattr(dpo_step, "measure", lambda steps, rounds: {n: times[n] for n in steps})
    name, seconds = dpo_step.fastest(dict.fromkeys(times, lambda: None))
    assert name == "compiled"
    assert seconds == {"eager": {"wall": 5.0, "cpu": 1.0}, "compiled": {"wall": 3.0, "cpu": 6.0}}
