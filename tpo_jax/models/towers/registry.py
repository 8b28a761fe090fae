"""Vision towers of published checkpoints, by the name in `vision.kind`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.models.layers import Rngs
from tpo_jax.models.towers.clip import ClipTower
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.languagebind import LanguageBindTower
from tpo_jax.models.towers.siglip import SiglipTower
from tpo_jax.models.towers.siglip2 import Siglip2Tower
from tpo_jax.models.towers.umt import UmtTower

TOWERS: dict[str, Callable[..., nnx.Module]] = {
    "siglip": SiglipTower,
    "siglip2": Siglip2Tower,
    "clip": ClipTower,
    "languagebind": LanguageBindTower,
    "umt": UmtTower,
}


def make_tower(config: TowerConfig, *, rngs: Rngs) -> nnx.Module:
    """The tower that `config.kind` names; called as tower(frames, frame_valid)."""
    return TOWERS[config.kind](config, rngs=rngs)


def normalise_pixels(config: TowerConfig, frames: jax.Array) -> jax.Array:
    """uint8[..., 3] -> float32[..., 3], (pixel / 255 - mean) / std."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in (config.mean, config.std))
    return (frames.astype(jnp.float32) / 255.0 - mean) / std
