"""Vision towers of published checkpoints, and what they are made of."""
