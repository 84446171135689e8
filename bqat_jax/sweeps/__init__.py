"""Sweeps: many runs of one recipe, compared over seeds."""

from bqat_jax.sweeps.definition import Sweep

__all__ = ['Sweep']
