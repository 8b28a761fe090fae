"""Every subcommand shows how it is called."""

import pytest

from tpo_jax import convert, preferences


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
