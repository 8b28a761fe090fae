"""Trains video-language models that know where and when, on TPU pods, in JAX."""

__version__ = "0.1.0"
