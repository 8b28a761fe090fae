"""What a compiled program sends between chips, read from its text.

    found = read_collectives(compiled.as_text())
    found["all-gather"].bytes     # that one chip sends in one run of the program

A loop multiplies what its body sends by its trip count. Bytes are those of a ring, the least that
any algorithm needs: with n chips in a group and a result of R bytes, an all-gather sends
R * (n - 1) / n, an all-reduce twice that, a reduce-scatter R * (n - 1), an all-to-all
R * (n - 1) / n, a permutation R.

Of programs for TPU the bytes cannot be relied upon: they do not tell trip counts, so that a loop
counts once, and a gather that is fused with products stands in them several times.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BITS = {"pred": 8, "bf16": 16, "token": 0}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """count: times that it is in the program text, a loop's body once. bytes: see the module."""

    count: int
    bytes: float


def read_collectives(text: str) -> dict[str, Collective]:
    """{kind: Collective} of HLO text; an asynchronous pair (-start, -done) is one."""
    bodies, entry = _computations(text)
    # A reduce-scatter is a fusion of an all-reduce and the slice that a chip keeps of it.
    counts: collections.Counter = collections.Counter()
    for name, lines in bodies.items():
        for kind, _ in _own(name, lines):
            counts[kind] += 1
    sent = _sent(entry, bodies, {}) if entry else collections.Counter()
    return {kind: Collective(count, sent[kind]) for kind, count in counts.items()}


def _computations(text: str) -> tuple[dict[str, list[re.Match]], str]:
    """{computation: its instructions}, name of the entry; text without computations is one."""
    bodies: dict[str, list[re.Match]] = {"": []}
    current, entry = "", ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            bodies[current].append(match)
        elif match := _COMPUTATION.match(line):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
    return bodies, entry


def _own(computation: str, lines: list[re.Match]) -> Iterator[tuple[str, float]]:
    """(kind, bytes) of each collective that stands in a computation itself."""
    for match in lines:
        kind = match[3].removesuffix("-start")
        if kind not in KINDS:
            continue
        arrays = [_bytes(*array) for array in _ARRAY.findall(match[2])]
        if match[3] == "all-gather-start":  # (operands, results)
            arrays = arrays[len(arrays) // 2 :]
        elif match[3] == "collective-permute-start":  # operand, result, two counters
            arrays = arrays[1:2]
        chips, result = _group_size(match[4]), sum(arrays)
        if computation.startswith("all-reduce-scatter"):
            yield "reduce-scatter", result * (chips - 1) / chips
            continue
        rings = {"all-reduce": 2 / chips, "reduce-scatter": 1.0}.get(kind, 1 / chips)
        yield kind, result if kind == "collective-permute" else result * (chips - 1) * rings


def _sent(name: str, bodies: dict[str, list[re.Match]], known: dict) -> collections.Counter:
    """{kind: bytes} of one run of a computation."""
    if name in known:
        return known[name]
    total: collections.Counter = collections.Counter()
    for kind, size in _own(name, bodies[name]):
        total[kind] += size
    for match in bodies[name]:
        trips = 1
        if match[3] == "while":
            found = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', match[4])
            trips = int(found[1]) if found else 1
        elif match[3].removesuffix("-start") in KINDS or match[3].endswith(("-done", "-update")):
            continue  # to_apply is the sum; what an asynchronous end names, its start has named
        for names in _CALLED.findall(match[4]):
            for called in re.findall(r"%([\w.\-]+)", names):
                for kind, size in _sent(called, bodies, known).items():
                    total[kind] += trips * size
    known[name] = total
    return total


def _bytes(kind: str, sizes: str) -> float:
    bits = _ITEM_BITS.get(kind) or int((re.search(r"\d+", kind) or [0])[0])
    size = bits / 8
    for number in filter(None, sizes.split(",")):
        size *= int(number)
    return size


def _group_size(attributes: str) -> int:
    """Chips of one group; all three ways in which HLO writes groups."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # an axis, or a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return 1
