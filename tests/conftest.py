"""One environment for every test: CPU, eight fake devices, a compile cache."""

import gc
import os
import pathlib

import extras
import hypothesis
import pytest
from processes import QUICK

# tests/models/test_cudnn.py wants the GPU: TPO_TEST_PLATFORM=cuda python -m pytest that file.
os.environ["JAX_PLATFORMS"] = os.environ.get("TPO_TEST_PLATFORM", "cpu")
# Programs for one device run on the first of the eight; tests/pod uses them all.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = (os.environ.get("XLA_FLAGS", ""), QUICK, "--xla_force_host_platform_device_count=8")
    os.environ["XLA_FLAGS"] = " ".join(flags)
# A second run reads compiled programs back.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Tracing makes many objects that live on; looking for cycles among them as often as Python does by
# itself takes a twelfth of the time.
gc.set_threshold(50_000, 10, 10)
# A busy machine is no failure.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


def pytest_configure():
    if message := extras.missing(os.environ.get("TPO_TEST_EXTRAS", "")):
        raise pytest.UsageError(message)
