"""Reference log-probabilities as data: one file beside the pairs, refused when anything changed.

A sidecar holds float32[2, A] per-token log-probabilities (chosen, rejected) per pair, together with
a fingerprint of everything that can change them: weights, tokenizer, template, preprocessing,
bucket, compute type and attention backend for the whole file, and one digest per pair of its frame
indices and token ids. Reading with another fingerprint or digest fails and names both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from tpo_jax.parallel import paths

FORMAT_VERSION = 1


class SidecarMismatch(ValueError):
    """The sidecar was scored under other conditions than the ones it is read for."""


def hash_weights(params: Any) -> str:
    """SHA-256 over (path, dtype, shape, bytes) of every leaf in path order.

    Leaves are hashed as whole arrays, so the result does not depend on how they are sharded.

    Args:
      params: nested dict of arrays (JAX or NumPy).
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.flatten(params).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path}:{array.dtype.name}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON-able value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_row(frame_indices: Sequence[int], *tokens: np.ndarray) -> str:
    """Digest of what one pair shows the model: its frame indices and its int32 token arrays."""
    digest = hashlib.sha256(np.asarray(frame_indices, np.int64).tobytes())
    for array in tokens:
        array = np.ascontiguousarray(array, np.int32)
        digest.update(f"{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Everything but the pair itself that changes a reference log-probability."""

    weights: str
    tokenizer: str
    template: str
    preprocessing: str
    bucket: str
    dtype: str
    attention: str

    def require(self, stored: Fingerprint, where: str) -> None:
        """Raises SidecarMismatch naming every field that differs and both of its values."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(stored)
        different = [key for key in ours if ours[key] != theirs[key]]
        if different:
            lines = [f"  {key}: sidecar {theirs[key]!r}, this run {ours[key]!r}"
                     for key in different]
            raise SidecarMismatch(
                f"{where}: the reference log-probabilities were scored under other conditions:\n"
                + "\n".join(lines)
                + "\nRun `python -m tpo_jax.preferences score` again with this run's reference "
                "model, data and bucket.")


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Scored pairs in memory.

    Attributes:
      fingerprint: conditions under which all pairs were scored.
      digests: pair id -> hash_row of the pair.
      logps: pair id -> float32[2, A]; row 0 chosen, row 1 rejected, zero where there is no token.
    """

    fingerprint: Fingerprint
    digests: Mapping[str, str]
    logps: Mapping[str, np.ndarray]
    path: str = "<memory>"

    def lookup(self, pair_id: str, digest: str) -> np.ndarray:
        """float32[2, A] of one pair; SidecarMismatch when it is absent or shows other tokens."""
        if pair_id not in self.logps:
            raise SidecarMismatch(
                f"{self.path}: pair {pair_id!r} was never scored ({len(self.logps)} pairs are). "
                "Score the same pairs file that is trained on.")
        if self.digests[pair_id] != digest:
            raise SidecarMismatch(
                f"{self.path}: pair {pair_id!r} was scored with frames and tokens "
                f"{self.digests[pair_id]}, but is read with {digest}. The pair, its frame "
                "indices or its text changed since; score again.")
        return self.logps[pair_id]


def write(path: epath.PathLike, sidecar: Sidecar) -> None:
    """Writes a sidecar as .npz (temporary name, then rename)."""
    path = epath.Path(path)
    ids = sorted(sidecar.logps)
    header = {"format_version": FORMAT_VERSION,
              "fingerprint": dataclasses.asdict(sidecar.fingerprint)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.asarray(json.dumps(header)),
        ids=np.asarray(ids, dtype=str),
        digests=np.asarray([sidecar.digests[i] for i in ids], dtype=str),
        logps=np.stack([np.asarray(sidecar.logps[i], np.float32) for i in ids])
        if ids else np.zeros((0, 2, 0), np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(buffer.getvalue())
    temporary.rename(path)


def read(path: epath.PathLike, expected: Fingerprint | None = None) -> Sidecar:
    """Reads a sidecar and, when `expected` is given, refuses one scored under other conditions."""
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no reference sidecar. Write it with `python -m tpo_jax.preferences score`.")
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
        if header["format_version"] != FORMAT_VERSION:
            raise SidecarMismatch(
                f"{path}: format_version {header['format_version']}, expected {FORMAT_VERSION}. "
                "Score again with this version.")
        ids = [str(i) for i in file["ids"]]
        digests = dict(zip(ids, (str(d) for d in file["digests"]), strict=True))
        logps = dict(zip(ids, file["logps"], strict=True))
    sidecar = Sidecar(Fingerprint(**header["fingerprint"]), digests, logps, str(path))
    if expected is not None:
        expected.require(sidecar.fingerprint, str(path))
    return sidecar


def merge(parts: Sequence[Sidecar]) -> Sidecar:
    """Joins parts scored under one fingerprint; a pair in two parts is an error."""
    first, *rest = parts
    digests, logps = dict(first.digests), dict(first.logps)
    for part in rest:
        first.fingerprint.require(part.fingerprint, part.path)
        if twice := digests.keys() & part.digests.keys():
            raise ValueError(f"{part.path}: pair {min(twice)!r} was already scored in another part")
        digests.update(part.digests)
        logps.update(part.logps)
    return Sidecar(first.fingerprint, digests, logps)
