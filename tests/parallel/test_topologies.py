"""Names of topologies; compiling for them is in tests/plan."""

import importlib.util

import pytest

from tpo_jax.errors import UserError
from tpo_jax.parallel import topologies
from tpo_jax.parallel.topologies import CHIPS, GIB, parse_topology


@pytest.mark.parametrize(
    ("name", "sizes", "hbm"),
    [("v5e:2x4", (2, 4), 16), ("v4:2x2x2", (2, 2, 2), 32), ("v5p:2x2x1", (2, 2, 1), 95)],
)
def test_names(name, sizes, hbm):
    chip, got = parse_topology(name)
    assert got == sizes and chip.hbm == hbm * GIB and chip is CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected GENERATION:SIZES"),
        ("h100:2x4", "generation of v4, v5p, v5e, v6e"),
        ("v5e:2x4x1", "v5e has 2 dimensions"),
        ("v4:2x2", "v4 has 3 dimensions"),
        ("v5e:0x4", "v5e has 2 dimensions, got"),
    ],
)
def test_names_that_are_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(topologies.os, "environ", {})
    topologies.prepare_environment()  # --help and mistakes in a config need none
    with pytest.raises(UserError, match=r"'v5e:2x4': libtpu.*pip install 'tpo_jax\[plan\]'"):
        topologies.topology_devices("v5e:2x4")
