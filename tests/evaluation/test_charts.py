"""Charts are well-formed SVG that stays inside its frame."""

import xml.etree.ElementTree as ElementTree

import hypothesis
import hypothesis.strategies as st
import pytest

from tpo_jax.evaluation import charts


@hypothesis.settings(deadline=None)
@hypothesis.given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(one, two):
    low, high = min(one, two), max(one, two)
    hypothesis.assume(high == low or high - low > 1e-9 * max(abs(low), abs(high)))
    ticks = charts.ticks(low, high, 4)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    "value, text", [(1500, "1.5k"), (0.25, "0.25"), (0, "0"), (-3, "-3"), (123.4, "123")]
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


def test_charts_are_well_formed_and_escape_names():
    line = charts.line_chart(
        {"a<b": [(0, 1.0), (10, 2.0), (20, float("nan"))], "empty": []}, title='"x" & y'
    )
    parsed = ElementTree.fromstring(line)
    path = parsed.find("polyline").get("points").split()
    assert len(path) == 2  # the value that is not finite is left out
    time = charts.timeline(0, 8, labels=[[1, 2]], predictions=[[1, 3, 0.9], [5, 6, 0.1]],
                           curve=[(0, 0.5), (8, 1.0)])  # fmt: skip
    for chart in (line, time, charts.bars({"train": 3.5, "render <1>": 0.0}, unit="s")):
        root = ElementTree.fromstring(chart)
        width = float(root.get("viewBox").split()[2])
        for rect in root.iter("rect"):
            assert (
                0
                <= float(rect.get("x"))
                <= float(rect.get("x")) + float(rect.get("width"))
                <= width + 0.1
            )


def test_nothing_to_draw_is_no_chart():
    assert charts.line_chart({"a": []}, title="t") == ""
    assert charts.bars({}, unit="s") == ""
