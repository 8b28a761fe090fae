"""summary.json and report.html of a run made by a noisy oracle."""

import json
import os
import platform
import re
import statistics

import fake_run
import jax
import pytest
from promised_metrics import METRICS, PREFERENCE

from tpo_jax.evaluation import report, results, summary
from tpo_jax.evaluation.targets import Target, check_targets


@pytest.fixture(scope="module")
def run_dir(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fake_run.make_run(folder, prepared)
    found = summary.assemble(
        folder, seed=3, seconds={"render": 61.5, "train/stage1": 212.0},
        cpu_seconds={"render": 120.0, "train/stage1": 330.0}, wall_seconds=240.0,
        max_abs_difference=0.0,
    )  # fmt: skip
    summary.write_summary(folder, found)
    return folder


@pytest.fixture(scope="module")
def page(run_dir):
    return report.build_report(run_dir).read_text()


@pytest.fixture(scope="module")
def found(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def test_summary_has_the_promised_keys(found):
    assert {"seed", "device", "versions", "seconds", "floors", "eval", "counts", "export"} <= set(
        found
    )
    assert set(found["eval"]) == {"base", "stage1", "stage2", "stage3", "dpo"}
    assert set(found["eval"]["dpo"]) >= METRICS
    assert all(set(metrics) >= PREFERENCE for metrics in found["eval"].values())
    assert set(found["floors"]) >= METRICS
    blind = found["eval"]["dpo"]["preference/accuracy_blind"]
    assert all(found["floors"][metric] == blind for metric in PREFERENCE)
    assert found["export"] == {"max_abs_difference": 0.0}
    assert found["seconds"]["render"] == 61.5
    assert found["counts"]["pairs"]["train"]["written"] == 500
    assert found["counts"]["data"]["test"]["videos"] == 3
    test = found["counts"]["test"]
    assert (test["videos"], test["images"]) == (3, 1)


def test_the_device_is_named_with_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 7})
    assert summary.describe_device() == "8 x cpu"
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    assert summary.describe_device() == "cpu (x86_64, 2 cores)"


def test_the_accuracy_of_videos_stands_beside_that_of_all(run_dir, found, page):
    items = json.loads((run_dir / "eval" / "dpo.json").read_text())["items"]
    every, videos = items["qa/accuracy"], items["qa/accuracy_videos"]
    asked = zip(every["videos"], every["values"], strict=True)
    of_videos = [value for video, value in asked if video in set(videos["videos"])]
    assert 0 < len(of_videos) < len(every["values"])
    metrics = found["eval"]["dpo"]
    assert metrics["qa/accuracy_videos"] == pytest.approx(statistics.fmean(of_videos), abs=1e-6)
    lines = summary.format_table(found).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["qa/accuracy", "qa/accuracy_videos"]
    assert f"{found['floors']['qa/accuracy_videos']:.3f}" in lines[2]
    assert "on 3 held-out videos and 1 images" in page


def test_pairs_that_were_scored_apart_stand_with_their_stage(found):
    accuracy = {stage: metrics["preference/accuracy"] for stage, metrics in found["eval"].items()}
    assert accuracy == {
        "base": 0.5, "stage1": 0.583333, "stage2": 0.666667, "stage3": 0.75, "dpo": 0.833333,
    }  # fmt: skip
    low, high = found["intervals"]["stage1"]["preference/accuracy"]
    assert low <= 0.583333 <= high
    assert found["changes"]["stage3 - base"]["preference/accuracy"]["value"] == 0.25
    row = next(
        line for line in summary.format_table(found).splitlines()
        if line.startswith("preference/accuracy ")
    )  # fmt: skip
    assert row.split()[1:] == ["0.500", "0.500", "0.583", "0.667", "0.750", "0.833"]


def test_it_shows_whether_the_floors_had_learnt_what_they_can(found, page):
    blind, middle = (found["floor_training"][f"floor_{e}"] for e in ("blind", "middle_frame"))
    assert (blind["steps"], blind["chosen_step"], middle["chosen_step"]) == (100, 50, 100)
    assert blind["validations"] == [
        {"step": 50, "train/loss": 0.8, "validation/loss": 0.9,
         "validation/answer_accuracy": 0.25},
        {"step": 100, "train/loss": 0.7, "validation/loss": 1.3,
         "validation/answer_accuracy": 0.375},
    ]  # fmt: skip
    table = summary.format_table(found)
    assert re.search(r"floor_blind +0.250 at step 50, 0.375 at step 100; chosen: step 50", table)
    assert "floor_middle_frame: loss" in page  # the curve
    assert "<td>floor_blind</td><td class='n'>50</td><td class='n'>0.800</td>" in page


def test_changes_are_paired(found):
    change = found["changes"]["dpo - stage3"]["mask/j"]
    expected = found["eval"]["dpo"]["mask/j"] - found["eval"]["stage3"]["mask/j"]
    assert change["value"] == pytest.approx(expected, abs=1e-5)
    low, high = change["interval"]
    assert low <= change["value"] <= high


def test_the_table_says_what_was_missed(found):
    table = summary.format_table(found)
    assert re.search(r"MISSED +\d+ >= +400 +test questions with options", table)
    assert re.search(r"hit +500 >= +500 +pairs for training", table)
    hits = sum(target["hit"] is True for target in found["targets"])
    assert f"{hits} of {len(found['targets'])} targets hit" in table
    row = next(line for line in table.splitlines() if line.startswith("mask/j "))
    assert f"{found['floors']['mask/j']:.3f}" in row and " - " in row  # the base has no heads


def test_targets_compare_with_floors_and_stages():
    counts = {"test": {"questions": 400, "videos": 149}, "pairs": {}}
    targets = check_targets(
        {
            "base": {"qa/accuracy": 0.70, "qa/accuracy/order": 0.39},
            "stage3": {"temporal/r1@0.5": 0.55, "qa/accuracy": 0.67},
            "dpo": {"preference/accuracy": 0.80, "preference/accuracy_blind": 0.66},
        },
        {"qa/accuracy": 0.40, "qa/accuracy/order": 0.30, "temporal/r1@0.5": 0.20},
        counts,
    )
    hit = {target.name: target.hit for target in targets}
    assert hit["test questions with options"] is True
    assert hit["test videos they are about"] is False
    assert hit["pairs for training"] is None
    assert hit["floor of temporal/r1@0.5 (constant window)"] is True
    assert hit["base qa/accuracy"] is True
    assert hit["base qa/accuracy, floor + 0.25"] is True
    assert hit["base qa/accuracy/order, floor + 0.10"] is False
    assert hit["base qa/accuracy/counting, floor + 0.10"] is None
    assert hit["stage3 temporal/r1@0.5"] is True
    assert hit["stage3 temporal/r1@0.5, 3 x floor"] is False
    assert hit["stage3 qa/accuracy, base - 0.03"] is True
    assert hit["dpo preference/accuracy"] is True
    assert hit["dpo preference/accuracy, blind + 0.15"] is False
    assert Target("x", 0.3, 0.1 + 0.2).hit is True  # rounding does not decide


def test_an_evaluation_that_is_missing_or_old_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="floors.json: missing; write it with"):
        summary.assemble(
            tmp_path, seed=0, seconds={}, cpu_seconds={}, wall_seconds=0.0,
            max_abs_difference=None,
        )
    (tmp_path / "x.json").write_text('{"format_version": 0}')
    with pytest.raises(ValueError, match="x.json: format_version 0, expected 1"):
        results.read_json(tmp_path / "x.json")


def test_report_is_one_page_without_outside_assets(run_dir, page):
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert not list(run_dir.glob("*.tmp"))


def test_report_tells_the_time_that_passed(page):
    # Of 4.6 in steps that partly ran side by side, on more than one core.
    assert "4.0 minutes of commands (7.5 of processor time)" in page


def test_report_shows_every_part(page, found):
    for heading in ("Stage by stage", "Drawn predictions", "Training", "Data", "Time and commands"):
        assert f"<h2>{heading}</h2>" in page
    for title in (
        "When: windows",
        "Where: referring boxes",
        "referring masks",
        "Tracking",
        "Multiple",
    ):
        assert title in page
    assert page.count("data:image/png;base64,") >= 8
    assert page.count("<figure class='good'>") >= 4 and page.count("<figure class='bad'>") >= 4
    assert "stage2: loss" in page
    assert "python -m render --out=&lt;videos&gt;" in page  # escaped
    assert f"{found['eval']['stage3']['mask/j']:.3f}" in page
    assert page.count("<section>") == page.count("</section>")
