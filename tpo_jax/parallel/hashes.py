"""Hashes that tell whether two runs have the same weights and settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from tpo_jax.parallel import paths


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
