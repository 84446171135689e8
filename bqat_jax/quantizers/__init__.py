"""Quantizers and gradient estimators: frozen dataclasses with pure methods.

`base` defines the quantizer interface, `rounding` the estimator interface.
"""

from bqat_jax.quantizers.base import (
    QUANTIZERS,
    LevelQuantizer,
    Quantizer,
    UniformQuantizer,
    describe_quantizer,
    register_quantizer,
)
from bqat_jax.quantizers.estimators import ESTIMATORS, get_estimator, register_estimator
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
from bqat_jax.quantizers.rounding import EVALUATION, Context, Estimator
from bqat_jax.quantizers.sign_estimators import Piecewise, Polynomial, ReSTE, SignEstimator

__all__ = [
    'ESTIMATORS',
    'EVALUATION',
    'LCQ',
    'LSQ',
    'N2UQ',
    'PACT',
    'QUANTIZERS',
    'SAWB',
    'APoT',
    'AbsmeanTernary',
    'Binary',
    'Context',
    'DoReFa',
    'EWGSRange',
    'Estimator',
    'LSQPlus',
    'LevelQuantizer',
    'MinMax',
    'NuLSQ',
    'Octav',
    'PACTPlus',
    'Piecewise',
    'Polynomial',
    'Quantizer',
    'ReSTE',
    'SignEstimator',
    'StatsQ',
    'UniformQuantizer',
    'describe_quantizer',
    'get_estimator',
    'register_estimator',
    'register_quantizer',
]
