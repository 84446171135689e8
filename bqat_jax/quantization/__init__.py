"""Quantizers, gradient estimators and rules; all but `transform` import only jax and numpy."""
