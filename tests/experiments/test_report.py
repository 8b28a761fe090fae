"""The table and the page of a sweep, and whether differences are more than the seed."""

import csv
import itertools
import re
import xml.etree.ElementTree as ElementTree

import fake_sweep
import numpy as np
import pytest

from experiments.sweeps import plots, report, significance, table


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(folder, runs, outcomes) of 3 rates x 2 clips x 6 seeds, all finished."""
    out = tmp_path_factory.mktemp("sweep") / "rates<1>"
    runs = fake_sweep.write(out, seeds=6)
    return out, runs, [table.read(run) for run in runs]


def test_last_and_best_values_go_by_the_direction_of_the_metric(sweep):
    one = sweep[2][0]
    for metric, best in (("train/loss", min), ("validation/token_accuracy", max)):
        values = [value for _, value in one.curves[metric]]
        assert one.best(metric) == best(values) and one.final(metric) == values[-1]
    assert "train/nothing" not in one.curves  # null is a gap, not a number


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("train/loss", False), ("train/region/giou", False), ("eval/region/miou", True),
        ("validation/token_accuracy", True), ("eval/temporal/r1@0.5", True),
        ("eval/mask/j&f", True), ("train/grad_norm", False), ("time/goodput", True),
        ("eval/tracking/auc", True), ("eval/tracking/ao", True), ("eval/mask/ciou", True),
        ("eval/tracking/sr@0.75", True), ("eval/forced/tracking/lasot_p_norm", True),
        ("train/temporal/l1", False), ("train/preference/margin", True),
    ],
)  # fmt: skip
def test_losses_are_better_low_and_scores_high(metric, higher):
    assert table.higher_is_better(metric) == higher


def test_the_csv_has_every_run_option_and_metric(sweep):
    out, runs, outcomes = sweep
    report.write(out, runs)
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["run"] for row in rows] == [run.name for run in runs]
    assert {row["trainable[0][1]"] for row in rows} == {"0.0003", "0.001", "0.003"}
    for row, one in zip(rows, outcomes, strict=True):
        assert float(row["validation/loss (final)"]) == one.final("validation/loss")
        assert row["state"] == "finished" and row["restarts"] == "1"


def test_the_page_holds_everything_and_needs_nothing(sweep):
    out, runs, _ = sweep
    page = report.write(out, runs).read_text()
    assert "https://" not in page and "http://" not in page and "src=" not in page
    assert "rates&lt;1&gt;" in page and "rates<1>" not in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 5  # parallel coordinates and four metrics
    for chart in charts:
        lines = ElementTree.fromstring(chart).findall("polyline")
        assert sorted(int(line.get("data-run")) for line in lines) == list(range(len(runs)))
    best = re.findall(r"data-run='(\d+)'>(?:(?!</tr>).)*class='n best'", page)
    assert {runs[int(index)].varied["trainable[0][1]"] for index in best} == {1e-3}


def test_runs_that_have_not_begun_are_in_the_table(tmp_path):
    runs = fake_sweep.write(tmp_path, seeds=1, state="stopped")
    for run in runs:
        (tmp_path / run.name / "metrics.jsonl").unlink()
    page = report.write(tmp_path, runs).read_text()
    assert page.count("class='stopped'") == len(runs)
    with pytest.raises(ValueError, match="--metric=loss: no run has it"):
        report.write(tmp_path, runs, "loss")


def test_a_real_difference_is_shown_and_none_is_not(sweep):
    found = significance.compare(sweep[2], "validation/loss")
    by_setting = {(c.setting["trainable[0][1]"], c.setting["optimizer.clip"]): c for c in found}
    assert set(by_setting) == {(r, c) for r in fake_sweep.RATES for c in (0.5, 1.0)} - {(3e-4, 0.5)}
    better, same = by_setting[1e-3, 1.0], by_setting[3e-4, 1.0]
    assert better.seeds == 6 and better.p == 2 / 2**6
    assert better.difference.high < 0 and better.corrected == pytest.approx(5 * better.p)
    assert same.difference.value == 0 and same.p == 1 and not same.significant
    alone = significance.compare(
        [one for one in sweep[2] if one.run.varied["optimizer.clip"] == 0.5
         and one.run.varied["trainable[0][1]"] < 2e-3], "validation/loss")  # fmt: skip
    assert [c.significant for c in alone] == [True]


def test_unfinished_runs_prove_nothing(tmp_path):
    runs = fake_sweep.write(tmp_path, seeds=6, state="stopped")
    assert significance.compare([table.read(run) for run in runs], "validation/loss") == []


@pytest.mark.parametrize("changes", [(1.0,), (1.0, 2.0, 3.0), (1.0, -2.0, 0.5, 0.5), (0.0, 0.0)])
def test_sign_flips_are_counted_exactly(changes):
    sums = [abs(sum(s * c for s, c in zip(signs, changes, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(changes))]  # fmt: skip
    expected = np.mean([value >= abs(sum(changes)) - 1e-9 for value in sums])
    assert significance.sign_flip(changes) == expected


def test_many_seeds_are_sampled():
    assert significance.sign_flip([1.0] * 20) == 2**-14
    assert 0.5 < significance.sign_flip([1.0, -1.0] * 10) <= 1


def test_holm_never_lowers_a_probability_and_keeps_the_order(sweep):
    found = significance.compare(sweep[2], "train/loss")
    assert all(c.corrected >= c.p for c in found)
    ordered = sorted(found, key=lambda c: c.p)
    assert [c.corrected for c in ordered] == sorted(c.corrected for c in found)


def test_evaluations_are_paired_by_item_within_a_seed(tmp_path):
    runs = fake_sweep.write(tmp_path, seeds=2)
    for run in runs:
        gain = 0.5 if run.varied["optimizer.clip"] == 1.0 else 0.0
        values = [gain + 0.1 * (i % 3) + run.varied["seed"] for i in range(8)]
        fake_sweep.write_evaluation(tmp_path / run.name, values)
    found = significance.compare([table.read(run) for run in runs], "eval/qa/accuracy")
    by_clip = {c.setting["optimizer.clip"]: c for c in found}
    assert by_clip[1.0].difference.items == 16 and by_clip[1.0].seeds == 2
    assert by_clip[1.0].difference.low == pytest.approx(0.5) == by_clip[1.0].difference.high
    assert not by_clip[1.0].significant  # two seeds cannot show it


def test_the_best_run_is_darkest_and_a_missing_value_is_grey():
    def brightness(colour):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    low = plots.colours([3.0, 1.0, 2.0, None], higher_is_better=False)
    assert brightness(low[1]) < brightness(low[2]) < brightness(low[0]) and low[3] == plots.NO_VALUE
    high = plots.colours([3.0, 1.0], higher_is_better=True)
    assert brightness(high[0]) < brightness(high[1])


def test_axes_of_words_and_of_numbers_stay_inside_the_picture():
    axes = {"loss": ["sigmoid", "ipo", None], "rate": [1e-5, 1e-2, 1e-3], "one": [2, 2, 2]}
    chart = ElementTree.fromstring(plots.parallel_coordinates(axes, ["#000"] * 3))
    lines = {line.get("data-run"): line.get("points").split() for line in chart.iter("polyline")}
    assert [len(lines[str(i)]) for i in range(3)] == [3, 3, 2]
    height = float(chart.get("height"))
    rates = [float(lines[str(i)][-2].split(",")[1]) for i in range(3)]
    assert all(0 < y < height for y in rates)
    assert rates[2] == pytest.approx(rates[0] + (rates[1] - rates[0]) * 2 / 3, abs=0.2)  # log scale
    assert plots.parallel_coordinates({"alone": [1]}, ["#000"]) == ""
