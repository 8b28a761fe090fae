"""Every subcommand shows how it is called."""

import pytest
from absl import flags

from tpo_jax import convert, plan, preferences, train
from tpo_jax.training.config_flag import parse_flags


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (preferences.main, "preferences generate"),
        (preferences.main, "preferences score"),
        (convert.main, "convert export"),
        (convert.main, "convert import"),
        (convert.main, "convert check"),
    ],
)
def test_help_has_examples(main, command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command.split()[1], "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"  python -m tpo_jax.{command} --" in printed


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
