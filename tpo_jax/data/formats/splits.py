"""Files that hold several splits: which one is read is said, and none is taken unasked.

Training on what is tested is the mistake that nobody sees. So a file whose records are of several
splits is read with `Context.split` alone, which leaves the others out.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

from tpo_jax.data.problems import Invalid


class WrongSplit(Invalid):
    """`split` is missing where a file holds several, or is none of those that it holds."""


class Chosen:
    """The records of one file, counted by split.

    Args:
      file: it, for messages.
      wanted: the split that is read; None where it was not said.
    """

    def __init__(self, file: pathlib.Path, wanted: str | None):
        self.file, self.wanted = file, wanted
        self.held: collections.Counter[str] = collections.Counter()

    def takes(self, name: Any) -> bool:
        """Whether a record of the split `name` is read; None: it names none. Raises Invalid."""
        if name is not None and not isinstance(name, str):
            raise Invalid("split", name, "expected the name of a split", "correct it")
        self.held[name or ""] += 1
        if self.wanted is None:
            return len(self.held) == 1  # with a second one `check` refuses the file
        if not name:
            raise Invalid("split", None, "the record names none", "name it, or remove the record")
        return name == self.wanted

    def check(self) -> None:
        """Raises WrongSplit once all records were seen."""
        if self.wanted is None:
            if len(self.held) > 1:
                raise WrongSplit(
                    "split", None, f"{self.file} holds several: {self._counts()}",
                    "name one, with --split or as `split` in dataset.json or config.sources",
                )  # fmt: skip
        elif self.held and not any(self.held):
            raise WrongSplit(
                "split", self.wanted, f"the records of {self.file} name no split", "leave it out"
            )
        elif self.held and self.wanted not in self.held:
            raise WrongSplit(
                "split", self.wanted, f"{self.file} holds {self._counts()}", "name one of these"
            )

    def _counts(self) -> str:
        parts = []
        for name, count in sorted(self.held.items()):
            noun = "record" if count == 1 else "records"
            parts.append(f"{name or 'none named'} {count} {noun}")
        return ", ".join(parts)


def of_key(record: Any, key: str) -> Any:
    """What a record says under `key`; None where it says nothing."""
    if not isinstance(record, Mapping):
        raise Invalid("", record, "expected a JSON object", "write it as {...}")
    return record.get(key)
