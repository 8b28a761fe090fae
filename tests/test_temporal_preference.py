"""The studies of temporal preferences: figures against sums by hand, needles, every command."""

import json

import numpy as np
import pytest
from processes import QUICK, finish, start

from experiments.steps import read_journal
from experiments.temporal_preference import needles, report, runs, studies
from experiments.temporal_preference.__main__ import RESULTS
from tpo_jax.data.moving_shapes import render, simulate
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores

# Right answers of four questions about two videos, by model and seed.
ANSWERS = {
    "base": [(1, 0, 0, 0)] * 2,
    "sft": [(1, 1, 0, 0), (1, 0, 0, 0)],
    "dpo": [(1, 1, 1, 1), (1, 1, 1, 0)],
}

SEARCH = {
    "sft": {1e-4: runs.Searched(0.5, 0.25), 1e-3: runs.Searched(0.25, 0.125)},
    "dpo": {1e-4: runs.Searched(0.5, 0.25), 1e-3: runs.Searched(0.75, 0.375)},
}
# Two commands beside each other, then one alone: 120 s on the clock, 240 of processor time.
STEPS = (
    {"step": "a", "started": 0.0, "seconds": 90.0, "cpu_seconds": 120.0, "command": "python -m a"},
    {"step": "b", "started": 30.0, "seconds": 60.0, "cpu_seconds": 30.0, "command": "python -m b"},
    {"step": "c", "started": 500.0, "seconds": 30.0, "cpu_seconds": 90.0, "command": "python -m c"},
)


def write_evaluation(file, values, *metrics):
    scores = ItemScores(("a", "b", "c", "d"), ("v0", "v0", "v1", "v1"), values)
    record = results.evaluation_record(
        dict.fromkeys(metrics, scores), routing={}, about={"data": "test", "tasks": ["qa"]}
    )
    results.write_json(file, record)
    return file


@pytest.fixture
def journal(tmp_path):
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(step) + "\n" for step in STEPS))
    return file


@pytest.fixture
def figures(tmp_path):
    files = {}
    for model, by_seed in ANSWERS.items():
        for condition, metrics in (
            ("test", (studies.QA, studies.PREFERENCE, studies.HIDDEN)),
            (studies.BLIND, (studies.QA,)),
        ):
            for seed, values in enumerate(by_seed):
                values = values if condition == "test" else (0, 0, 0, 1)
                file = tmp_path / f"{model}{condition}{seed}.json"
                files.setdefault((model, condition), {})[seed] = write_evaluation(
                    file, values, *metrics
                )
    trained = {"sft": [9, 8], "dpo": [9, 8]}
    return report.figures("objectives", files, runs.FULL, trained, SEARCH)


def test_figures_are_pooled_over_seeds_and_paired_by_item(figures):
    rows = {(r["model"], r["condition"], r["metric"]): r for r in figures["rows"]}
    dpo = rows["dpo", "test", studies.QA]
    assert dpo["value"] == 7 / 8 and dpo["by_seed"] == [1.0, 3 / 4] and dpo["items"] == 8
    assert dpo["videos"] == 2  # seeds share them
    difference = dpo["difference"]
    assert difference["value"] == 5 / 8 and difference["by_seed"] == [3 / 4, 1 / 2]
    # Of two videos a draw holds v0 twice, v1 twice or both: gains of 2, 3 and 5 in 4, 4 and 8.
    assert difference["interval"] == [2 / 4, 3 / 4]
    assert "difference" not in rows["base", "test", studies.QA]


def test_a_claim_is_judged_by_the_interval(figures):
    verdicts = {claim["text"]: claim["verdict"] for claim in figures["claims"]}
    assert verdicts == {
        "DPO is better than the base": report.AGREES,
        "DPO is better than SFT on the preferred answers": report.AGREES,
        "SFT on the preferred answers is better than the base": report.UNDECIDED,
    }
    scores = {
        place: {0: ItemScores(("a", "b"), ("v0", "v1"), values)}
        for place, values in (
            (("dpo", "test", studies.QA), (0.0, 0.0)),
            (("base", "test", studies.QA), (1.0, 1.0)),
        )
    }
    worse = report._judge(studies.STUDIES["objectives"].claims[0], scores, runs.FULL)
    assert worse["verdict"] == report.DISAGREES


def test_every_figure_of_the_page_stands_beside_its_hidden_one(figures, journal, tmp_path):
    page = report.write(tmp_path / "results", figures, journal).read_text()
    assert (tmp_path / "results" / "objectives.png").stat().st_size > 1000
    assert (
        "| test | dpo | 0.875 [0.750, 1.000] | 1.000, 0.750 | +0.625 [+0.500, +0.750] | 0.250 |"
        in page
    )
    # The preference figures of the fake evaluations are the same with and without the video.
    assert "| test | sft | 0.375 [0.000, 0.750] | 0.500, 0.250 | " in page
    assert page.count("| 0.875 |\n") == 1
    assert "| +0.625 [+0.500, +0.750] | +0.000 | agrees |\n" in page
    assert "LongVideoBench 54.2 against 51.3" in page and "sft 9, 8; dpo 9, 8" in page
    assert (
        "sft 0.0001 of 0.0001 (0.500, hidden 0.250), 0.001 (0.250, hidden 0.125); "
        "dpo 0.001 of 0.0001 (0.500, hidden 0.250), 0.001 (0.750, hidden 0.375)." in page
    )


def test_the_page_says_what_all_commands_took_and_keeps_them(figures, journal, tmp_path):
    page = report.write(tmp_path / "results", figures, journal).read_text()
    assert (tmp_path / "results" / "steps.jsonl").read_text() == journal.read_text()
    assert "The 3 commands of these studies" in page
    assert "4 minutes of processor time in all, and 2 minutes in which" in page


def test_a_record_of_an_older_format_is_left_out_of_the_page(figures, journal, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    results.write_json(folder / "needles.json", {"format_version": 1, "study": "needles"})
    page = report.write(folder, figures, journal).read_text()
    assert "temporal_preference objectives`" in page and "needle in a haystack" not in page


class NoSteps:
    """Stands for `Steps`; what would be run is not, but written down."""

    def __init__(self, out):
        self.out, self.commands = out, []

    def run(self, step, *command):
        self.commands.append(" ".join(map(str, command)))

    def beside(self, step, *command):
        self.run(step, *command)

    def wait(self):
        pass


def pool_of(**counts):
    """Lines of a manifest, so many of each kind of manipulation."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return [json.dumps({"example_id": i, "targets": {"manipulation": kind}}) + "\n"
            for i, kind in enumerate(kinds)]  # fmt: skip


def test_an_objective_trains_at_the_rate_that_validation_chose(tmp_path):
    steps = NoSteps(tmp_path)
    study = runs.Runs(steps, runs.TINY)
    pool = tmp_path / "pairs_mix0.5_frames8"
    pool.mkdir()
    (pool / "pairs.jsonl").write_text("".join(pool_of(localized=8, comprehensive=4)))
    accuracy = {"sft": {1e-4: 0.5, 1e-3: 0.5}, "dpo": {1e-4: 0.5, 1e-3: 0.75}}
    (tmp_path / "eval").mkdir()
    for objective, found in accuracy.items():
        for rate, value in found.items():
            for more, share in (("", value), ("_hidden", 0.25)):
                file = tmp_path / "eval" / f"validation_{objective}_rate{rate:g}{more}.json"
                values = (1,) * round(4 * share) + (0,) * round(4 - 4 * share)
                write_evaluation(file, values, studies.QA)
    assert study.choose_rates() == {
        objective: {rate: runs.Searched(value, 0.25) for rate, value in found.items()}
        for objective, found in accuracy.items()
    }
    asked = [command for command in steps.commands if "tpo_jax.evaluate" in command]
    assert len(asked) == 8
    assert all(f"--data {tmp_path}/data/validation" in command for command in asked)
    hidden = [command for command in asked if command.endswith("--tasks qa --evidence blind")]
    assert len(hidden) == 4 and all("_hidden.json" in command for command in hidden)
    steps.commands.clear()
    model = study.train("localized", studies.MODELS["localized"], seed=1)
    assert model == tmp_path / "seed1" / "localized_rate0.001" / "model"
    assert "objective=dpo" in steps.commands[-1] and ",rate=0.001," in steps.commands[-1]
    assert ",manifest=seed1_localized_5.jsonl,count=5," in steps.commands[-1]
    study.train("sft", runs.Model("sft"), seed=1)  # of equal ones the lowest
    assert ",rate=0.0001," in steps.commands[-1]
    assert ",manifest=seed1_10.jsonl,count=10," in steps.commands[-1]


def fake_study(name, tmp_path):
    """(record of a study, its conditions): every model but the first gains by training, and all
    lose without the video."""
    study, files = studies.STUDIES[name], {}
    conditions = study.conditions(runs.Runs(NoSteps(tmp_path), runs.FULL))
    for condition, evaluation in conditions.items():
        tasks = " ".join(map(str, evaluation.arguments))
        metrics = [studies.QA]
        if "preference" in tasks:
            metrics += [studies.PREFERENCE, studies.HIDDEN]
        if name == "needles":
            metrics += [f"{report.DEPTH}{depth:g}" for depth in needles.DEPTHS]
        for place, model in enumerate(study.models):
            values = (1, 1, 1, 0) if place else (0, 1, 0, 1)
            values = (0, 0, 0, 1) if "blind" in tasks else values
            file = tmp_path / f"{model}{condition}.json"
            files[model, condition] = {0: write_evaluation(file, values, *metrics)}
    trained = {model: [8] for model in study.models[1:]}
    return report.figures(name, files, runs.FULL, trained, SEARCH), conditions


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_is_judged_drawn_and_written_beside_hidden(name, journal, tmp_path):
    study = studies.STUDIES[name]
    found, conditions = fake_study(name, tmp_path)
    assert len(found["claims"]) == len(study.claims)
    page = report.write(tmp_path / "results", found, journal).read_text()
    seen = [condition for condition in conditions if "hidden" not in condition]
    for condition in seen:
        assert studies.hidden_condition(condition) in conditions
        for model in study.models:
            row = next(r for r in page.splitlines() if r.startswith(f"| {condition} | {model} |"))
            assert row.endswith("| 0.250 |"), row
    assert "—" not in page
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000


def test_hidden_needles_are_asked_of_every_length_and_frames_once(tmp_path):
    steps = NoSteps(tmp_path)
    asked = studies.on_needles(runs.Runs(steps, runs.FULL))
    for seconds in runs.FULL.lengths:
        hidden = asked[f"needles hidden in {seconds} s"]
        assert hidden.data == asked[f"needles in {seconds} s"].data
        assert hidden.arguments == ("--tasks", "qa", "--evidence", "blind")
    of_frames = studies.on_frames(runs.Runs(steps, runs.FULL))
    assert list(of_frames) == ["8 frames", "16 frames", "test", "video hidden"]
    assert {studies.hidden_condition(c) for c in of_frames if c != "video hidden"} == {
        "video hidden"
    }


def test_hidden_cells_of_the_map_are_those_of_their_length_and_depth(tmp_path):
    record, _ = fake_study("needles", tmp_path)
    for row in record["rows"]:
        place = (row["model"], row["condition"], row["metric"])
        if place == ("sft", "needles hidden in 16 s", f"{report.DEPTH}0.75"):
            row["value"] = 0.125
    texts = [text.get_text() for ax in report.draw(record).axes for text in ax.texts]
    assert len(texts) == 3 * 5 * 3 and texts.count("0.75\n(0.25)") == 2 * 5 * 3 - 1
    assert texts.index("0.75\n(0.12)") == 15 + 3 * 3  # of the second model, fourth depth, first


def test_a_gain_between_conditions_stands_beside_that_of_the_untrained_base(tmp_path):
    record, _ = fake_study("frames", tmp_path)
    steps = []
    note = "gives +0.000. Between the same two the base, which no pair trained, gains +0.000 "
    assert f"{note}(0.500 to 0.500, hidden 0.250 to 0.250), no less: this" in report.render(
        [record], steps
    )
    for row in record["rows"]:
        if (row["model"], row["condition"], row["metric"]) == ("base", "8 frames", studies.QA):
            row["value"] = 0.7
    assert "gains -0.200 (0.700 to 0.500, hidden 0.250 to 0.250), less." in report.render(
        [record], steps
    )


def test_the_page_is_of_the_figures_beside_it():
    records, steps = report.read_records(RESULTS), read_journal(RESULTS / "steps.jsonl")
    assert [record["study"] for record in records] == list(studies.STUDIES)
    page = (RESULTS / "README.md").read_text()
    assert page == report.render(records, steps)
    assert "—" not in page
    assert "`--gap` is 0" in page and "the held-out ones too" in page and "--subset 0.125" in page
    assert page.count("which no pair trained") == 1
    assert not any(" /" in step["command"] for step in steps)  # paths are relative


def test_a_needle_is_the_same_wherever_it_is_and_everything_around_is_still():
    needle = simulate((7, 0), needles.NEEDLE)
    fps, length = needle.config.fps, needle.config.num_frames
    for depth, begin in ((0.0, 0), (0.5, 12 * fps), (1.0, 24 * fps)):
        scene = needles.place(needle, 32, depth)
        assert scene.config.num_frames == 32 * fps == scene.states.x.shape[1]
        inside = slice(begin, begin + length)
        for field in ("x", "y", "radius", "angle", "white"):
            states = getattr(scene.states, field)
            np.testing.assert_array_equal(states[:, inside], getattr(needle.states, field))
            for still in (states[:, :begin], states[:, begin + length :]):
                assert (still == still[:, :1]).all()
        assert [e.start - begin / fps for e in scene.events] == [e.start for e in needle.events]
        assert needles.questions_of(scene) == needles.questions_of(needle)
        assert len(render(scene).frames) == 32 * fps
    assert len(needles.questions_of(needle)) > 3


def test_a_seed_draws_its_pairs_and_fewer_are_the_first_of_more(tmp_path):
    manifest = tmp_path / "pairs.jsonl"
    lines = pool_of(localized=12, comprehensive=8)
    manifest.write_text("".join(lines))

    def drawn(wanted, seed, **kind):
        name, count = runs.draw_pairs(manifest, wanted, seed, **kind)
        found = (tmp_path / name).read_text().splitlines(keepends=True)
        assert len(found) == len(set(found)) == count and set(found) <= set(lines)
        return found

    ten = drawn(10, 0)
    assert len(ten) == 10 and drawn(4, 0) == ten[:4] and drawn(10, 0) == ten
    assert set(drawn(10, 1)) != set(ten) and sorted(drawn(30, 0)) == sorted(lines)
    assert sorted(drawn(30, 0, manipulation="comprehensive")) == sorted(lines[12:])
    assert ten == drawn(10, 0)  # a kind has a file of its own


@pytest.mark.long
def test_every_study_runs_from_end_to_end(tmp_path):
    command = ["-m", "experiments.temporal_preference", "all", "--tiny"]
    command += ["--seeds", 1, "--out", tmp_path]
    (ended,) = finish([start(*command, flags=QUICK)], timeout=3600)
    assert ended.status == 0, ended.out
    page = (tmp_path / "results" / "README.md").read_text()
    for name, study in studies.STUDIES.items():
        assert f"## {study.title}" in page
        record = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert {row["model"] for row in record["rows"]} == set(study.models)
        assert (tmp_path / "results" / f"{name}.png").exists()
    steps = (tmp_path / "steps.jsonl").read_text()
    assert (tmp_path / "results" / "steps.jsonl").read_text() == steps
    assert "hidden 0." in page and "—" not in page
    (again,) = finish([start(*command, flags=QUICK)])
    assert again.status == 0 and (tmp_path / "steps.jsonl").read_text() == steps
