"""What the compiler for a TPU decides before it generates code: memory, and the program's text.

Compiling a train step of a 7B model takes minutes, all but seconds of them for code. By then every
buffer has its place, and a program that does not fit has been refused. libtpu says so in its log
and writes the optimised program to a folder, if it is told to before it is loaded: so the compiler
runs in a process of its own, which is ended once both are there.

Read are `BufferAssignment stats` (TPU_VMODULE=buffer_assignment=1), whose total is parameters,
results and temporaries of one chip, in two decimals and with those that lie in its 128 MiB of VMEM,
and the file that ends in TLP-hlo.txt (--xla_jf_dump_to). Seen with libtpu 0.0.42.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

_TOTAL = re.compile(r"buffer_assignment\.cc:\d+\]\s+total allocation:\s+([\d.]+)([KMGT]?)i?B")
_RAN_OUT = re.compile(r"Ran out of memory in memory space hbm\. Used ([\d.]+)([KMGT]?) of")
_LOOK = 0.2  # seconds between two looks at what is written


@dataclasses.dataclass(frozen=True)
class Assigned:
    """memory: bytes of one chip. text: the program, "" where it does not fit. seconds: it took."""

    memory: int
    text: str
    seconds: float

    @property
    def ran_out(self) -> bool:
        return not self.text


def assigned(command: Sequence[str]) -> Assigned:
    """Runs a command whose first compilation for a TPU is that of the program.

    Raises:
      RuntimeError: it ended otherwise; holds the end of what it wrote.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        log = folder / "log.txt"
        options = (f"--xla_jf_dump_to={folder}", "--xla_jf_dump_hlo_text=true",
                   "--xla_jf_dump_llo_pass_label_regex=none")  # fmt: skip
        told = {"TPU_VMODULE": "buffer_assignment=1", "TPU_STDERR_LOG_LEVEL": "0",
                "TPU_MIN_LOG_LEVEL": "0", "LIBTPU_INIT_ARGS": " ".join(options)}  # fmt: skip
        with _running(command, os.environ | told, log) as process:
            while True:
                ended = process.poll() is not None
                total, text = _TOTAL.search(said := log.read_text(errors="replace")), _text(folder)
                if total and text:
                    return Assigned(_bytes(*total.groups()), text, time.monotonic() - begin)
                if ended:
                    break
                time.sleep(_LOOK)
    if needed := _RAN_OUT.search(said):
        return Assigned(_bytes(*needed.groups()), "", time.monotonic() - begin)
    raise RuntimeError(f"{' '.join(command)}: no buffer assignment in its log:\n{said[-4000:]}")


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], log: pathlib.Path
) -> Iterator[subprocess.Popen]:
    with (
        log.open("w") as to,
        subprocess.Popen(command, env=environment, stdout=to, stderr=to) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _text(folder: pathlib.Path) -> str:
    """Of the program, or "" as long as it is not written to the end of its last computation."""
    for file in folder.glob("*TLP-hlo.txt"):
        text = file.read_text()
        if "\nENTRY " in text and text.rstrip().endswith("\n}"):
            return text
    return ""


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))
