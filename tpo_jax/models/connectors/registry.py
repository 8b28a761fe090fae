"""Connectors of published checkpoints, by the name in `connector.kind`."""

from __future__ import annotations

from flax import nnx

from tpo_jax.models.connectors.config import MlpConnectorConfig, QFormerConfig
from tpo_jax.models.connectors.mlp import MlpConnector
from tpo_jax.models.connectors.qformer import QFormer
from tpo_jax.models.layers import Rngs

PublishedConnectorConfig = MlpConnectorConfig | QFormerConfig


def make_connector(
    config: PublishedConnectorConfig, width: int, language_width: int, *, rngs: Rngs
) -> nnx.Module:
    """The connector of `config`, called as connector(features, frame_valid)."""
    make = MlpConnector if isinstance(config, MlpConnectorConfig) else QFormer
    return make(config, width, language_width, rngs=rngs)
