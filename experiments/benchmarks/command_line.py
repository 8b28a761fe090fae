"""What the command lines of the benchmarks share: --out, sizes, --rounds and --threads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any, TypeVar

Sizes = TypeVar("Sizes")  # a dataclass of whole numbers that all have a default


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark of this folder, with --out, where `write_record` writes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks.{name}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    return parser


def add_sizes(parser: argparse.ArgumentParser, kind: type[Sizes]) -> None:
    """A flag for each field of the dataclass; its docstring says in --help what they are."""
    group = parser.add_argument_group("sizes", kind.__doc__)
    for field in dataclasses.fields(kind):
        add = group.add_argument
        add(f"--{field.name}", type=int, default=field.default, help="(default: %(default)s)")


def read_sizes(flags: argparse.Namespace, kind: type[Sizes]) -> Sizes:
    """What `add_sizes` added, as given."""
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """--rounds, and the --threads of PyTorch, which runs beside XLA on as many processors."""
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)),
        help="of PyTorch; XLA takes all processors that it may run on (default: %(default)s)",
    )  # fmt: skip


def write_record(out: pathlib.Path, record: Any) -> str:
    """Writes JSON, and its folder where there is none; returns the text."""
    text = json.dumps(record, indent=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
    return text
