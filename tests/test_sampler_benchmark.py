"""The benchmark of the sampler on sizes that take seconds; its figures mean nothing."""

import math

import pytest

from experiments.benchmarks import sampler


@pytest.mark.long
@pytest.mark.parity
def test_the_same_tokens_and_every_ratio():
    sizes = sampler.Sizes(frames=4, size=32, patch=8, questions=3, question=5, answer=6)
    result = sampler.run(sizes, width=64, depth=1, rounds=2, threads=1)  # raises on other tokens
    generate, reused = result["tokens_per_second"]
    assert result["answer_tokens"] <= 18 and result["distinct_tokens"] > 1
    assert generate["met"] == (generate["wall"] >= sampler.TARGET)
    for row in (generate, reused):
        assert all(math.isfinite(row[kind]) and row[kind] > 0 for kind in ("wall", "cpu"))
    # Three videos and prefixes against one; decoding is the same.
    assert 1 < generate["flops"] < 3 and reused["flops"] == 1
