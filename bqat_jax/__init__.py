"""Quantization-aware training with block replacement on a full-precision partner (arXiv 2412.15846), in JAX.

The names below are the library, which needs jax, flax, optax and numpy. The training program (`bqat_jax.experiment`,
`bqat_jax.sweeps`) needs the rest of requirements.txt.
"""

import importlib.metadata
import tomllib
from pathlib import Path

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.splitting import split_after, split_into
from bqat_jax.networks.registry import register_network
from bqat_jax.quantizers import (
    LCQ,
    LSQ,
    N2UQ,
    PACT,
    SAWB,
    AbsmeanTernary,
    APoT,
    Binary,
    Context,
    DoReFa,
    Estimator,
    EWGSRange,
    LevelQuantizer,
    LSQPlus,
    MinMax,
    NuLSQ,
    Octav,
    PACTPlus,
    Quantizer,
    StatsQ,
    UniformQuantizer,
    get_estimator,
    register_estimator,
    register_quantizer,
)
from bqat_jax.replacement.block_replacement import Batch, BlockReplacement, replace_blocks
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Variables
from bqat_jax.replacement.plans import Plan, register_plan
from bqat_jax.replacement.schedules import register_schedule
from bqat_jax.replacement.task_kinds import Classification, LanguageModel, MultiLabel, Regression, Segmentation
from bqat_jax.replacement.tasks import CustomTask, Metric, Task, get_task, register_task
from bqat_jax.transform import Quantization, find_layers, prepare, register_layer

__all__ = [
    'LCQ',
    'LSQ',
    'N2UQ',
    'PACT',
    'SAWB',
    'APoT',
    'AbsmeanTernary',
    'Batch',
    'Binary',
    'BlockNetwork',
    'BlockReplacement',
    'Classification',
    'Context',
    'CustomTask',
    'DoReFa',
    'EWGSRange',
    'Estimator',
    'LSQPlus',
    'LanguageModel',
    'LevelQuantizer',
    'Metric',
    'MinMax',
    'MultiLabel',
    'NuLSQ',
    'Objective',
    'Octav',
    'PACTPlus',
    'Plan',
    'Quantization',
    'Quantizer',
    'Regression',
    'Segmentation',
    'StatsQ',
    'Task',
    'UniformQuantizer',
    'Variables',
    'find_layers',
    'get_estimator',
    'get_task',
    'prepare',
    'register_estimator',
    'register_layer',
    'register_network',
    'register_plan',
    'register_quantizer',
    'register_schedule',
    'register_task',
    'replace_blocks',
    'split_after',
    'split_into',
]


def _version() -> str:
    """Returns the version of the installed package, or of the checkout if the package is not installed."""
    try:
        return importlib.metadata.version('bqat_jax')
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / 'pyproject.toml'
        return tomllib.loads(project.read_text(encoding='utf-8'))['project']['version']


__version__ = _version()
