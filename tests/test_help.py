"""Every subcommand shows how it is called."""

import sys

import pytest
from absl import app, flags

from experiments import base, demo, real_files, sweep
from experiments.task_preference import cost
from tpo_jax import convert, plan, predict, preferences, train
from tpo_jax.data.moving_shapes import __main__ as moving_shapes
from tpo_jax.training.config_flag import parse_flags


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (preferences.main, "preferences generate"),
        (preferences.main, "preferences score"),
        (convert.main, "convert export"),
        (convert.main, "convert import"),
        (convert.main, "convert check"),
        (moving_shapes.main, "data.moving_shapes"),
    ],
)
def test_help_has_examples(main, command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split()[1:], "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"  python -m tpo_jax.{command} --" in printed


@pytest.mark.parametrize("limit", ["requests_per_minute", "max_tokens", "max_cost"])
def test_limits_of_an_endpoint_are_said_to_be_of_each_shard(limit, capsys):
    with pytest.raises(SystemExit):
        preferences.main(["generate", "--help"])
    about = capsys.readouterr().out.partition(f"  --{limit} {limit.upper()}")[2]
    assert "each of --shards" in " ".join(about.partition("\n  --")[0].split())


def test_help_of_predict_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "    python -m tpo_jax.predict --model=runs/demo/stage3/model --video=" in printed
    assert "--model=runs/demo/stage3/model --input=list.jsonl --out=predictions\n" in printed


@pytest.mark.parametrize(
    ("command", "example"),
    [
        (sweep, "--config=configs/demo.py:stage=2 --out=runs/seeds --parallel=2"),
        (cost, "--measure "),
        (base, "--out runs/base"),
        (demo, "--out runs/demo --seed 0"),
        (real_files, "--media FOLDER --out runs/mine --results runs/mine/results"),
    ],
)
def test_help_of_experiments_has_examples(command, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.__name__, "--help"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m {command.__name__} ")
    assert f"    python -m {command.__name__} {example}" in printed


@pytest.mark.parametrize(
    ("command", "example", "own"),
    [
        (train, "--config=configs/demo.py:stage=1 --workdir=runs/demo/stage1", "--workdir:"),
        (plan, "--config=configs/demo.py:stage=1 --topology=v5e:2x4", "--topology:"),
    ],
)
def test_help_of_commands_with_a_config_has_examples(command, example, own, monkeypatch, capsys):
    """What absl prints for the module that Python runs."""
    monkeypatch.setitem(sys.modules, "__main__", command)
    monkeypatch.setattr(sys, "argv", [command.__name__, "--help"])
    app.define_help_flags()  # as `app.run` does first
    with pytest.raises(SystemExit) as caught:
        parse_flags(sys.argv)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"    python -m {command.__name__} {example}\n" in printed
    assert f"  {own} " in printed and "  --config: " in printed


@pytest.mark.parametrize(
    ("command", "own"), [(train, {"config", "dry_run", "workdir"}), (plan, {"config", "topology"})]
)
def test_commands_with_a_config_name_their_flags_and_help_is_no_failure(command, own, monkeypatch):
    key = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(command.__name__)}
    assert own <= key

    def help_and_exit(argv):
        raise SystemExit(1)  # as absl does

    monkeypatch.setattr(flags, "FLAGS", help_and_exit)
    with pytest.raises(SystemExit) as caught:
        parse_flags(["command", "--help"])
    assert caught.value.code == 0
