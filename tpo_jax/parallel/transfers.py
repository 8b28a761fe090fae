"""What a program that is compiled for several TPU slices sends over the data centre network.

The compiler lowers a collective that spans slices to collectives within each slice and a pair
`send`, `recv` between every chip and its host, which the network's runtime joins; the attribute
`_xla_megascale_transfer_type` says what for. All other collectives of the program number the chips
of one slice and stay within it.
"""

import collections
import dataclasses
import math
import re

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # otherwise the digits at the end of the name
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_SEND = re.compile(r"= \((\w+)\[([\d,]*)\].* send\(")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Transfers of one kind in one step.

    kind: as the compiler names it, such as ALL_REDUCE. count: in one step. bytes: that a chip hands
    over in one step.
    """

    kind: str
    count: int
    bytes: int


def find_transfers(program_text: str) -> list[Transfer]:
    """Transfers between slices in HLO text of a compiled program, largest first.

    Raises:
      ValueError: a transfer in a loop of unknown length.
    """
    found: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    sends = collections.defaultdict(list)
    callers = collections.defaultdict(list)  # computation -> (caller, times in a pass of it)
    here = entry = ""
    for line in program_text.splitlines():
        if header := _COMPUTATION.match(line):
            here = header[2]
            entry = here if header[1] else entry
            continue
        called = _CALLED.findall(line)
        for names in _BRANCHES.findall(line):
            called += re.findall(r"[\w.\-]+", names)
        if called:
            times = _trip_count(line) if " while(" in line else 1
            for name in called:
                callers[name].append((here, times))
        if (kind := re.search(r'_xla_megascale_transfer_type="(\w+)"', line)) and (
            send := _SEND.search(line)
        ):
            sends[here].append((kind[1], _bytes(send[1], send[2])))
    for computation, inside in sends.items():
        passes = _passes(computation, entry, callers)
        for kind, size in inside:
            found[kind] += passes
            sizes[kind] += passes * size
    transfers = [Transfer(kind, count, sizes[kind]) for kind, count in found.items()]
    return sorted(transfers, key=lambda transfer: -transfer.bytes)


def _passes(computation: str, entry: str, callers: dict) -> int:
    """How often a computation runs in one pass of the program."""
    if computation == entry:
        return 1
    total = 0
    for caller, times in callers[computation]:
        if times is None:
            raise ValueError(f"{computation}: a transfer between slices in a loop of {caller} "
                             "whose length the compiler does not state")  # fmt: skip
        total += times * _passes(caller, entry, callers)
    return total


def _trip_count(line: str) -> int | None:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    return int(match[1]) if match else None


def _bytes(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
