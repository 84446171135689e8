"""Quantizers: pure functions of arrays behind small frozen dataclasses; `base` says what they share."""

from bqat_jax.quantizers.base import (
    QUANTIZERS,
    LevelQuantizer,
    Quantizer,
    UniformQuantizer,
    describe_quantizer,
    register_quantizer,
)
from bqat_jax.quantizers.learned import LSQ, PACT, EWGSRange, LSQPlus, PACTPlus
from bqat_jax.quantizers.measured import (
    SAWB,
    AbsmeanTernary,
    Binary,
    DoReFa,
    MinMax,
    Octav,
    StatsQ,
)
from bqat_jax.quantizers.nonuniform import LCQ, N2UQ, APoT, NuLSQ

__all__ = [
    'LCQ',
    'LSQ',
    'N2UQ',
    'PACT',
    'QUANTIZERS',
    'SAWB',
    'APoT',
    'AbsmeanTernary',
    'Binary',
    'DoReFa',
    'EWGSRange',
    'LSQPlus',
    'LevelQuantizer',
    'MinMax',
    'NuLSQ',
    'Octav',
    'PACTPlus',
    'Quantizer',
    'StatsQ',
    'UniformQuantizer',
    'describe_quantizer',
    'register_quantizer',
]
