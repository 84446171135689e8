"""Quantization-aware training with block replacement on a full-precision partner (arXiv 2412.15846), in JAX."""

__version__ = '0.1.0'
