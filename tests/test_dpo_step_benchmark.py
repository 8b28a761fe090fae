"""The benchmark of the preference step on sizes that take seconds; its figures mean nothing."""

import math

import pytest

from experiments.benchmarks import dpo_step


@pytest.mark.long
@pytest.mark.parity
def test_all_programs_agree_and_every_ratio_is_reported():
    sizes = dpo_step.Sizes(pairs=1, frames=4, tokens_per_frame=8, text=6, answer=3)
    result = dpo_step.run(sizes, dpo_step.model_config(64, 1), rounds=2, threads=1)
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
