"""The benchmark of the sampler on sizes that take seconds; its figures mean nothing."""

import math
import types

import numpy as np
import pytest

from experiments.benchmarks import sampler

TOKENS = np.array([[3, 4, 5], [6, 2, 0]])


def side(*answers):
    """A program that gives these answers one after the other, or raises them."""
    left = list(answers)

    def generate():
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return types.SimpleNamespace(generate=generate)


def test_a_setting_that_does_not_run_is_kept_with_its_reason():
    sides = {"plain": side(TOKENS[:, :2]), "compiled": side(RuntimeError("no C++ compiler")),
             "static": side(TOKENS)}  # fmt: skip
    runs, refused = sampler.usable(sides, "generate", TOKENS)
    assert list(runs) == ["plain", "static"]
    assert refused == {"compiled": "RuntimeError: no C++ compiler"}
    with pytest.raises(RuntimeError, match="no C"):  # without the first there is no baseline
        sampler.usable({"plain": side(RuntimeError("no C"))}, "generate", TOKENS)


def test_a_setting_with_other_tokens_ends_the_benchmark():
    sides = {"plain": side(TOKENS), "static": side(TOKENS + 1)}
    with pytest.raises(AssertionError, match="generate, static, answers"):
        sampler.usable(sides, "generate", TOKENS)


@pytest.mark.parametrize(("seconds", "met"), [(3.1, True), (2.9, False)])
def test_every_ratio_is_judged(seconds, met):
    times = {"ours": [(1.0, 2.0)] * 3, "reused_cache": [(seconds, 3.0), (seconds, 5.0), (9.0, 4.0)]}
    row = sampler.ratio_row("reused_cache", times)
    assert (row["target"], row["met"]) == (3.0, met)
    assert (row["wall"], row["cpu"]) == (seconds, 2.0)


@pytest.mark.long
@pytest.mark.parity
def test_the_same_tokens_and_every_ratio():
    sizes = sampler.Sizes(frames=4, size=32, patch=8, questions=3, question=5, answer=6)
    settings = [name for name, how in sampler.SETTINGS.items() if not how["compiled"]]
    result = sampler.run(  # raises on other tokens
        sizes, width=64, depth=1, rounds=2, threads=1, settings=settings
    )
    generate, reused = result["tokens_per_second"]
    assert result["answer_tokens"] <= 18 and result["distinct_tokens"] > 1
    for row in (generate, reused):
        assert row["met"] == (row["wall"] >= sampler.TARGET)
        assert all(math.isfinite(row[kind]) and row[kind] > 0 for kind in ("wall", "cpu"))
        assert set(row["settings"]) == set(settings) and row["refused"] == {}
        assert row["setting"] == min(settings, key=lambda name: row["settings"][name]["wall"])
    # Three videos and prefixes against one; decoding is the same.
    assert 1 < generate["flops"] < 3 and reused["flops"] == 1
