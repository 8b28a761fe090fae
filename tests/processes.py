"""Python in processes of their own: they compile quickly, and several can find each other."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jaxlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Less than half the time of compiling, which is most of a test's time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # an unknown flag ends a process
    QUICK += " --xla_cpu_use_fusion_emitters=false"


class Ended(NamedTuple):
    """Exit status of a process, and what it wrote to stdout and stderr."""

    status: int
    out: str
    err: str


def start(
    *arguments: object, flags: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """`python ARGUMENTS` in the repository; `flags` are XLA's, by which it has one device."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags} | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(running: Sequence[subprocess.Popen], timeout: float = 600) -> list[Ended]:
    """Waits for all, prints their stderr, and leaves none behind."""
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for _, err in said:
        print(err)
    return [Ended(p.returncode, *each) for p, each in zip(running, said, strict=True)]


def free_port() -> int:
    """For a coordinator on this machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_two(program: str, *arguments: object) -> list[str]:
    """stdout of `python -c PROGRAM ARGUMENTS PORT INDEX` for index 0 and 1; both must succeed."""
    port = free_port()
    ended = finish([start("-c", program, *arguments, port, index) for index in range(2)])
    assert [process.status for process in ended] == [0, 0], ended
    return [process.out for process in ended]
