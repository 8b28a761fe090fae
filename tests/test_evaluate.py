"""The command line of `tpo_jax.evaluate`: which tasks are scored, what is refused and how."""

import pytest

from tpo_jax import evaluate
from tpo_jax.errors import UserError
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores
from tpo_jax.evaluation.floors import Candidate

HEADS = ("region", "temporal", "mask")


def test_all_that_can_be_scored_is_scored():
    assert evaluate.choose_tasks("", "full", HEADS, "p") == [
        "qa", "temporal", "region", "mask", "tracking", "preference",
    ]  # fmt: skip
    assert evaluate.choose_tasks("", "full", (), "") == ["qa"]
    assert evaluate.choose_tasks("", "full", ("mask",), "") == ["qa", "mask", "tracking"]
    assert evaluate.choose_tasks("", "blind", HEADS, "") == ["qa"]
    assert evaluate.choose_tasks("region,qa", "full", HEADS, "") == ["region", "qa"]


@pytest.mark.parametrize(
    "asked, shown, heads, message",
    [
        ("places", "full", HEADS, "'places' is not a task; known: qa, temporal"),
        ("mask", "full", ("region",), r"'mask' cannot be scored: the model answers \['region'\]"),
        ("region", "blind", HEADS, "'region' cannot be scored: --evidence=blind hides"),
        ("preference", "full", HEADS, "give the held-out pairs with --pairs"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked, shown, heads, message):
    with pytest.raises(ValueError, match=message):
        evaluate.choose_tasks(asked, shown, heads, "")


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    missing = [f"--model={tmp_path / 'nothing'}", f"--data={tmp_path}", f"--out={tmp_path / 'o'}"]
    assert evaluate.main(missing) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nothing" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_floors_need_a_prepared_split(tmp_path, capsys):
    arguments = [f"--floors_from={tmp_path}", f"--data={tmp_path}", f"--out={tmp_path / 'o'}"]
    assert evaluate.main(arguments) == 2
    assert "is not a prepared folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--model=m", "--floors_from=t"]])
def test_one_of_model_and_floors(given):
    with pytest.raises(SystemExit):
        evaluate.parse([*given, "--data=d", "--out=o"])


@pytest.mark.parametrize(
    "given, message",
    [
        (["--model=a", "--model=b", "--out=o"], "1 different files for 2 models, expected 2"),
        (["--model=a", "--model=b", "--out=o", "--out=o"], "1 different files for 2 models"),
        (["--model=a", "--out=o", "--out=p"], "2 different files for 1 models, expected 1"),
        (["--floors_from=t", "--out=o", "--out=p"], "2 different files for 0 models, expected 1"),
    ],
)
def test_each_model_has_a_file_of_its_own(given, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse([*given, "--data=d"])
    assert message in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    assert "python -m tpo_jax.evaluate --model=" in capsys.readouterr().out


def test_floors_stand_beside_the_metrics_of_their_split(tmp_path):
    found = {"qa/accuracy": [Candidate("first option", 0.25, 0.3)]}
    file = tmp_path / "floors.json"
    results.write_json(file, results.floors_record(found, train="data/train", data="data/test"))
    floors = results.read_floors(file, "data/test/")
    assert floors == {"qa/accuracy": 0.3}
    with pytest.raises(UserError, match="floors of data/test, expected those of data/other"):
        results.read_floors(file, "data/other")
    rows = [(f"{video}/{i}", video, i) for video in ("a", "b") for i in (0, 1)]
    scores = {name: ItemScores.of(rows) for name in ("qa/accuracy", "qa/accuracy/order")}
    lines = {}
    for name, known in (("with", floors), ("without", {})):
        record = results.evaluation_record(scores, routing={}, about={"floors": known})
        lines[name] = results.format_metrics(record).splitlines()
    assert lines["with"][0].split()[:3] == ["metric", "value", "floor"]
    assert lines["with"][0].split()[-2:] == ["items", "videos/images"]
    assert lines["with"][1].split()[-2:] == ["4", "2"]
    assert lines["with"][1].startswith(f"{'qa/accuracy':32s}   0.500   0.300  [ 0.500,")
    assert lines["with"][2].startswith(f"{'qa/accuracy/order':32s}   0.500          [ 0.500,")
    assert lines["without"][1].startswith(f"{'qa/accuracy':32s}   0.500  [ 0.500,")


def test_one_video_has_no_interval():
    scores = {"qa/accuracy": ItemScores.of([("a/0", "a", 1), ("a/1", "a", 0)])}
    record = results.evaluation_record(scores, routing={}, about={"floors": {}})
    line = results.format_metrics(record).splitlines()[1]
    assert line == f"{'qa/accuracy':32s}   0.500                 -       2             1"
