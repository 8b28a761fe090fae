"""The command line that benchmarks share."""

import dataclasses
import json

import pytest

from experiments.benchmarks import command_line


@dataclasses.dataclass(frozen=True)
class Sizes:
    """rows: of a batch. text: tokens."""

    rows: int = 2
    text: int = 32


def parser():
    made = command_line.make_parser("sampler", "What it measures.")
    command_line.add_sizes(made, Sizes)
    command_line.add_rounds(made, 5)
    return made


def test_every_size_is_a_flag_with_its_default():
    flags = parser().parse_args(["--out=x.json", "--text=7"])
    assert command_line.read_sizes(flags, Sizes) == Sizes(rows=2, text=7)
    assert flags.rounds == 5 and flags.threads > 0


def test_help_says_what_the_sizes_are(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m experiments.benchmarks.sampler ")
    assert "What it measures." in printed and "rows: of a batch. text: tokens." in printed


def test_a_record_is_written_into_a_new_folder(tmp_path):
    out, record = tmp_path / "new/record.json", {"ratio": 1.5}
    text = command_line.write_record(out, record)
    assert json.loads(out.read_text()) == json.loads(text) == record
