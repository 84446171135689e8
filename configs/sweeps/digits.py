"""Compares replacement plans with plain QAT and distillation on the digits, at equal steps.

Command: python main.py --mode=sweep \
    --config.sweep=configs/sweeps/digits.py --config.train.replicas=4 --workdir=runs/sweeps/digits
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import METHODS, SETTINGS, STEPS, learning_rates, replacement


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={name: {**replacement(**keys), 'train.steps': STEPS} for name, keys in METHODS.items()},
        seeds=range(8),
        baseline='LSQ',
        settings=SETTINGS,
        choices=learning_rates(0.005, 0.02, 0.08),
        choice_seeds=range(100, 104),
    )
