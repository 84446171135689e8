"""Measures gradient, feature and quantization errors of a low-precision network on some batches."""
