"""Reading a compiler's decisions; tests/experiments/test_plans.py has the real one."""

import sys
import textwrap

import pytest

from experiments.assigned_memory import assigned

# Stands for a process in which libtpu compiles.
WRITES = """
import os, pathlib, re, sys, time
folder = re.search(r"--xla_jf_dump_to=(\\S+)", os.environ["LIBTPU_INIT_ARGS"])[1]
assert "buffer_assignment" in os.environ["TPU_VMODULE"]
at = "I0101 00:00:00.000000  1 buffer_assignment.cc:2666]"
"""
PROGRAM = "HloModule m\n\n%f (x: f32[]) -> f32[] {\n}\n\nENTRY %main (x: f32[]) -> f32[] {\n}\n"


def command(rest: str) -> list[str]:
    return [sys.executable, "-c", WRITES + textwrap.dedent(rest)]


def test_it_is_ended_once_its_buffers_have_their_places():
    found = assigned(command(f"""
        print(at, "     parameter allocation:   1.00GiB", file=sys.stderr)
        print(at, "         total allocation:  1.50GiB", file=sys.stderr, flush=True)
        program = {PROGRAM!r}
        with open(pathlib.Path(folder) / "17-TLP-hlo.txt", "w") as file:
            file.write(program[:40])  # ends a computation, not the program
            file.flush()
            time.sleep(0.5)
            file.write(program[40:])
        time.sleep(1000)
    """))  # fmt: skip
    assert found.memory == 1.5 * 2**30 and found.text == PROGRAM and not found.ran_out
    assert found.seconds < 500


def test_what_does_not_fit_is_read_from_its_refusal():
    found = assigned(command("""
        print(at, "         total allocation:  21.40GiB", file=sys.stderr)
        print("Ran out of memory in memory space hbm. Used 21.25G of 15.75G hbm.", file=sys.stderr)
    """))
    assert found.ran_out and found.memory == 21.25 * 2**30


def test_another_end_is_told_with_what_it_wrote():
    with pytest.raises(RuntimeError, match="no buffer assignment(.|\n)*no such flag"):
        assigned(command('sys.exit("no such flag")'))
