"""Bad input by name: the file, the record, the field, what is there and what would be right."""

from __future__ import annotations

import dataclasses
from typing import Any

from tpo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of a quarantine report. `record` is empty when a whole file is meant."""

    file: str
    record: str
    field: str
    value: Any
    reason: str
    fix: str

    def __str__(self) -> str:
        place = f"{self.file} [{self.record}]" if self.record else self.file
        field = f" {self.field}: {_short(self.value)}:" if self.field else ""
        return f"{place}:{field} {self.reason}. Fix: {self.fix}."

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"value": _short(self.value)}


class Invalid(UserError):
    """A field that cannot be used; whoever knows the file and the record makes it a Problem."""

    def __init__(self, field: str, value: Any, reason: str, fix: str):
        super().__init__(f"{field}: {_short(value)}: {reason}. Fix: {fix}.")
        self.field, self.value, self.reason, self.fix = field, value, reason, fix

    def __reduce__(self):
        return Invalid, (self.field, self.value, self.reason, self.fix)

    def at(self, file: str, record: str) -> Problem:
        return Problem(file, record, self.field, self.value, self.reason, self.fix)


def differs(have: Any, want: Any) -> tuple[str, Any, str] | None:
    """(field, value, reason) of the first difference of two kinds of features, dataclasses of one
    class; None: the same."""
    for field in dataclasses.fields(want):
        ours, theirs = getattr(want, field.name), getattr(have, field.name)
        if ours != theirs:
            return field.name, theirs, f"expected {ours!r}: these are other features"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
