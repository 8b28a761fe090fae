"""How the loader benchmark counts; its figures need videos and minutes."""

import os
import subprocess
import sys
import time

import pytest

from experiments.benchmarks import loader


def timing(per_second, per_core):
    return loader.Timing(clips=10, wall=10 / per_second, cpu=10 / per_core, memory=0)


def test_a_ratio_is_to_the_better_data_loader_of_the_same_round():
    found = {
        "raw": [timing(40, 100), timing(20, 100), timing(30, 90)],
        "jpeg": [timing(4, 4), timing(4, 4), timing(4, 4)],
        "video": [timing(1, 1)] * 3,
        "pyav": [timing(1, 2), timing(1, 1), timing(2, 1)],
        "decord": [timing(2, 1), timing(1, 1), timing(1, 3)],
    }
    rows = loader.ratios(found, ["pyav", "decord"])
    assert rows["raw"]["per_second"] == pytest.approx(20) and rows["raw"]["met"]
    assert rows["raw"]["per_core"] == pytest.approx(50)
    assert rows["raw"]["per_core_least"] == pytest.approx(30)
    assert rows["jpeg"]["per_second"] == pytest.approx(2) and not rows["jpeg"]["met"]
    assert rows["video"]["target"] is None and "met" not in rows["video"]


def test_cpu_time_and_memory_include_children():
    grow = "x = bytearray(b'1' * 2**26)\nwhile sum(range(10**5)): pass"
    before = loader.cpu_seconds(os.getpid()), loader.memory_bytes(os.getpid())
    with subprocess.Popen([sys.executable, "-c", grow]) as child:
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until and (
                loader.cpu_seconds(os.getpid()) < before[0] + 0.2
                or loader.memory_bytes(os.getpid()) < before[1] + 2**26
            ):
                time.sleep(0.1)
            assert child.pid in loader.family(os.getpid())
            assert time.monotonic() < until
        finally:
            child.kill()
