"""Every process checks at the start that all of them are about to do the same thing.

A process with another config, other code or other data does not fail: it computes other gradients,
or waits for ever in a collective that nobody else is in. So before the first collective each one
lays its facts down where the others can read them, waits a limited time for theirs, and stops with
the name of the odd one out.
"""

import hashlib
import importlib.metadata
import json
import pathlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax._src import distributed  # the key-value store has no public name

import tpo_jax
from tpo_jax.errors import UserError
from tpo_jax.parallel.mesh import describe_shape

TIMEOUT = 300.0  # seconds; hosts of a pod start, and index their data, some minutes apart
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")
# What a prepared folder says about its content; tables and shards follow from these.
_INDEX_FILES = ("prepared.json", "index.jsonl")


class Disagreement(UserError, RuntimeError):
    """Processes that would not run the same program; names who differs in what."""


def identity(
    sources: Sequence[Mapping[str, Any]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """What a run depends on beside its config, JSON: code, libraries, kind of device, mesh, random
    settings, data.

    Args:
      sources: entries of data.train and data.validation.
    """
    return {
        "code": code_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "device": jax.devices()[0].device_kind,
        "mesh": describe_shape(mesh),  # as made: config.mesh may leave a size to the devices
        "random": {
            "implementation": str(jax.config.jax_default_prng_impl),
            "partitionable": bool(jax.config.jax_threefry_partitionable),
        },
        "data": {path: fingerprint for path, fingerprint in _fingerprints(sources)},
    }


def code_version() -> str:
    """Version and digest of the program's source files: "0.1.0+3f2a..."."""
    root, digest = pathlib.Path(tpo_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{tpo_jax.__version__}+{digest.hexdigest()[:12]}"


def _fingerprints(sources: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(path, digest) of every prepared folder and manifest of pairs."""
    for source in sources:
        folder = epath.Path(source["path"])
        yield str(source["path"]), _digest([folder / name for name in _INDEX_FILES])
        if source.get("pairs"):
            yield str(source["pairs"]), _digest([epath.Path(source["pairs"])])


def _digest(paths: Sequence[epath.Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.exists() else b"missing")
    return digest.hexdigest()[:12]


def facts(config: Mapping[str, Any], mesh: jax.sharding.Mesh, identity: Mapping) -> dict[str, str]:
    """What has to be equal on all processes, by name."""
    listed = {f"config.{key}": json.dumps(value, sort_keys=True) for key, value in config.items()}
    listed |= {
        "process count": str(jax.process_count()),
        "devices of a process": str(jax.local_device_count()),
        "mesh": f"{dict(mesh.shape)} of devices {[d.id for d in mesh.devices.flat]}",
        "code": identity["code"],
    }
    for part in ("libraries", "random", "data"):
        listed |= {f"{part}: {key}": str(value) for key, value in identity[part].items()}
    return listed


def check(mine: Mapping[str, str], timeout: float = TIMEOUT) -> None:
    """Returns once every process has shown the same facts.

    Raises:
      Disagreement: a process did not come within `timeout` seconds, or shows other facts.
    """
    count = jax.process_count()
    if count == 1:
        return
    store = distributed.global_state.client
    store.key_value_set(f"agreement/{jax.process_index()}", json.dumps(dict(mine)))
    shown, absent = [], []
    for index in range(count):
        try:
            # Those who are late share one time-out: after the first, the others are only looked up.
            left = 1.0 if absent else timeout
            shown.append(json.loads(store.blocking_key_value_get(
                f"agreement/{index}", int(1000 * left))))  # fmt: skip
        except jax.errors.JaxRuntimeError:
            absent.append(index)
    if absent:
        raise Disagreement(
            f"process {_listed(absent)} of {count} did not report within {timeout:g} s of "
            f"process {jax.process_index()}; look at its log, and start all of them again"
        )
    if lines := differences(shown):
        raise Disagreement(
            f"the {count} processes would not run the same program:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nStart the same command with the same code, config and data on every host."
        )


def differences(shown: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for every fact that differs: who has what, the odd ones out first named."""
    lines = []
    for name in sorted({name for facts in shown for name in facts}):
        values = Counter(facts.get(name, "nothing") for facts in shown)
        if len(values) == 1:
            continue
        # The larger group is right; of two equal ones that of process 0.
        usual = max(values, key=lambda value: (values[value], value == shown[0].get(name)))
        for value in values:
            if value != usual:
                who = [i for i, facts in enumerate(shown) if facts.get(name, "nothing") == value]
                lines.append(
                    f"process {_listed(who)}: {name} is {_short(value)}, "
                    f"the others have {_short(usual)}"
                )
    return lines


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """How the identity of a checkpoint differs from this process's: (what forbids, what does not).

    Other random settings or other data under the same path give another run. Other code is what
    mends a bug, and another kind of device, or another mesh, is what there is; they are told, not
    refused.
    """
    forbids = _differing(saved, now, "random", {*saved["random"], *now["random"]})
    # Sources that come or go are a matter of the config.
    forbids += _differing(saved, now, "data", {*saved["data"]} & {*now["data"]})
    told = _differing(saved, now, "libraries", {*saved["libraries"], *now["libraries"]})
    for part in ("code", "device", "mesh"):
        # Older checkpoints name neither device nor mesh.
        if part in saved and saved[part] != now[part]:
            told.append(f"{part}: checkpoint has {saved[part]}, this command has {now[part]}")
    return forbids, told


def _differing(
    saved: Mapping[str, Any], now: Mapping[str, Any], part: str, keys: Collection[str]
) -> list[str]:
    a, b = saved[part], now[part]
    return [
        f"{part}: {key}: checkpoint has {a.get(key)}, this command has {b.get(key)}"
        for key in sorted(keys)
        if a.get(key) != b.get(key)
    ]
