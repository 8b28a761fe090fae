"""What the user can put right is one line and status 2, in every command; a bug is a traceback."""

import pathlib
import re

import pytest
from absl import flags

from tpo_jax import convert, evaluate, plan, predict, preferences, prepare, train
from tpo_jax.errors import UserError
from tpo_jax.training import config_flag

SCORE = ("score", "--data=d", "--pairs=p.jsonl", "--out=o.npz")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (evaluate, ("--data=d", "--out=o.json")),
        (predict, (f"--video={__file__}", "--prompt=What?", "--out=o")),
        (preferences, ("generate", "--data=d", "--out=o")),
        (preferences, SCORE),
        (convert, ("export", "--out=o")),
    ],
)
def test_a_missing_model_folder_is_one_line(command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([*arguments, "--model=nowhere"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: nowhere\S*: .*missing.*\n", error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (evaluate, ("--model=m",), "the following arguments are required: --data, --out"),
        (predict, ("--model=m", "--video=v.mp4"), "--video needs --prompt"),
        (convert, ("export", "--modle=m"), "the following arguments are required: --model, --out"),
        (prepare, ("run", "--out=o", "--sise=64"), "unrecognized arguments: --sise=64"),
    ],
)
def test_a_wrong_flag_is_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: {message}; see python -m tpo_jax\.\w+( \w+)? --help\n", error)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (predict, ("--model=m", "--video=v.mp4", "--prompt=?"), "--video: v.mp4 does not exist"),
        (prepare, ("check", "--format=native", "--annotations=a"), "--annotations: a does not exi"),
    ],
)
def test_a_missing_file_is_one_line(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("command", [train, plan])
def test_a_run_without_a_config_says_so(command, monkeypatch):
    monkeypatch.setattr(flags.FLAGS["config"], "value", None)
    monkeypatch.setattr(flags.FLAGS["config"], "present", 1)  # as after parsing
    with pytest.raises(UserError, match="--config is missing; give one such as configs/demo.py"):
        command.run(["command"])


@pytest.mark.parametrize("command", [train, plan])
def test_of_commands_with_a_config_too(command, monkeypatch, capsys):
    def run(argv):
        raise raised

    monkeypatch.setattr(command, "run", run)
    raised = UserError("config.steps=-1: expected at least 1")
    with pytest.raises(SystemExit) as ended:
        command.main(["command"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: config.steps=-1: expected at least 1\n"
    raised = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        command.main(["command"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs/demo.py", "--config.nope=1"), "--config.nope: config has no 'nope'; it has acc"),
        (
            ("configs/demo.py", "--config.optimizer.nmae=adamw"),
            "--config.optimizer.nmae: config.optimizer has no 'nmae'; it has b2, clip, eps, ",
        ),
        (  # TR-DPO's option of TRL
            ("configs/longva_tpo.py", "--config.preference.sync_ref_model=True"),
            "--config.preference.sync_ref_model: config.preference has no 'sync_ref_model'; it has",
        ),
        (("configs/nope.py",), "--config: configs/nope.py does not exist; correct the path"),
        (("configs/demo.py:stag=1",), "config argument 'stag=1': unknown key 'stag'; known: stage"),
        (("nope.json",), "nope.json: no such config; expected WORKDIR/config.json"),
        (("configs/demo.py", "--config.steps=x"), "flag --config.steps=x: invalid literal for int"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(arguments, message, monkeypatch, capsys):
    values = flags.FlagValues()
    argv = ["train", f"--config={arguments[0]}", *arguments[1:]]
    config_flag.define_config("config", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as ended:
        config_flag.parse_flags(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_every_class_of_error_is_the_users_or_says_why_not():
    """New ones belong below UserError, unless a command handles them by itself."""
    package = pathlib.Path(train.__file__).parent
    text = "".join(path.read_text() for path in sorted(package.rglob("*.py")))
    others = re.findall(r"^class (\w+)\((?:\w+Error|Exception)\):", text, re.MULTILINE)
    users = {name for name, base in re.findall(r"^class (\w+)\((\w+)", text, re.MULTILINE)
             if base in ("UserError", "CheckpointError", "ManifestError", "PrepareError")}
    assert {"ManifestError", "RecordError", "SidecarMismatch", "DamagedCheckpoint"} <= users
    assert set(others) - users == {"UserError", "Preempted", "DryRunError", "RequestRefused",
                                   "BudgetSpent", "Stopped", "_Malformed"}  # fmt: skip
