"""Connectors of published checkpoints: from patch features to visual tokens."""
