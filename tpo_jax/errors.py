"""Mistakes that whoever runs a command can put right: one line instead of a traceback.

Every room raises `UserError`, or a class of its own below it, where a flag, a config, a file or a
folder is not what it should be. Every command ends with `report` on one. Any other exception is a
bug, and its traceback is shown.
"""

import argparse
import sys
from typing import NoReturn

EXIT_STATUS = 2  # as argparse has it; 75 says "start me again" (training.preemption)


class UserError(ValueError):
    """Something given is wrong; the message names where it is, what it is and what would do."""


class MissingFile(UserError, FileNotFoundError):
    """A file that was named, or belongs to what was named, is not there."""


class Parser(argparse.ArgumentParser):
    """Tells of a wrong flag in one line, without the usage of a command with thirty of them."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_STATUS, f"error: {message}; see {self.prog} --help\n")


def report(error: UserError) -> int:
    """Prints `error: ...` to stderr; returns the exit status of the command."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_STATUS
