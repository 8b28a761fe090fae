"""TPU topologies that can be compiled for without a TPU (needs the extra `plan`: libtpu)."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from tpo_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      hbm: bytes of memory a chip.
      peak: dense bfloat16 FLOP/s a chip.
      hbm_bandwidth: bytes/s between the memory of a chip and its cores.
      ici: bytes/s that a chip sends over all its links to other chips; it receives as many.
      dimensions: of its network: 2 (torus of x:y) or 3 (x:y:z).
      host: largest block of chips on one host.
      options: extra arguments of get_topology_desc. v4 and v5p need megacore, else every chip
        shows as two devices.
    """

    hbm: int
    peak: float
    hbm_bandwidth: float
    ici: float
    dimensions: int
    host: tuple[int, ...]
    options: dict[str, str] = dataclasses.field(default_factory=dict)


# Published figures of https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of
# the generations. Those give the bandwidth of links in both directions together, or in Gbit/s.
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 3, (2, 2, 1), {"chip_config_name": "megacore"}),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 3, (2, 2, 1), {"chip_config_name": "megacore"}),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 2, (2, 2)),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, 2, (2, 2)),
}


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """"v4:2x2x2" -> (Chip, (2, 2, 2)).

    Raises:
      ValueError: unknown generation, or not as many sizes as its network has dimensions.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f"topology {name!r}: expected GENERATION:SIZES such as v5e:2x4 or v4:2x2x2 with a "
            f"generation of {', '.join(CHIPS)}"
        )
    chip, sizes = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
    if len(sizes) != chip.dimensions or min(sizes) < 1:
        raise UserError(
            f"topology {name!r}: {match[1]} has {chip.dimensions} dimensions, got {sizes}"
        )
    return chip, sizes


def prepare_environment() -> None:
    """Settings that libtpu wants where there is no TPU; call before JAX starts a backend."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Several compilers at a time disturb nobody; the lock is for programs that own the chips.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if library := _libtpu():
        os.environ.setdefault("TPU_LIBRARY_PATH", library)


def topology_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of a topology, to build a mesh and to compile for; nothing can run on them.

    With several slices (each of this topology, joined by the data centre network) slice after
    slice.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    chip, sizes = parse_topology(name)
    if not _libtpu():
        raise UserError(
            f"topology {name!r}: libtpu, which compiles for it, is not installed; install the "
            "extra: pip install 'tpo_jax[plan]'"
        )
    prepare_environment()
    host = tuple(min(size, bound) for size, bound in zip(sizes, chip.host, strict=True))
    host = host + (1,) * (3 - len(host))
    generation = name.split(":")[0]
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{generation}-8")
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=name,
        chips_per_host_bounds=host,
        wrap=(False,) * 3,
        num_slices=num_slices,
        **chip.options,
    )
    devices = list(description.devices)
    if len(devices) != (expected := math.prod(sizes) * num_slices):
        raise RuntimeError(f"{num_slices} x {name}: expected {expected} chips, got {devices}")
    return devices


def _libtpu() -> str | None:
    """Its file; None where it is not installed."""
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        return None
    return os.path.join(spec.submodule_search_locations[0], "libtpu.so")
