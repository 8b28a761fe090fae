"""The command line of `tpo_jax.evaluate`: which tasks are scored, what is refused and how."""

import pytest

from tpo_jax import evaluate

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


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    assert "python -m tpo_jax.evaluate --model=" in capsys.readouterr().out
