"""Compares the methods of digits.py in the harder settings at equal compute: the cheaper a step, the more steps.

All have the compute of 160 steps of `prefix`, by the units of docs/method.md.

Command: python main.py --mode=sweep \
    --config.sweep=configs/sweeps/digits_equal_compute.py --config.train.replicas=4 \
    --workdir=runs/sweeps/digits_equal_compute
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import HARDER, METHODS, STEPS, UNITS, learning_rates, replacement


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={
            name: {**replacement(**keys), 'train.steps': round(STEPS * UNITS['prefix'] / UNITS[name])}
            for name, keys in METHODS.items()
        },
        seeds=range(8),
        baseline='LSQ',
        settings=HARDER,
        choices=learning_rates(0.005, 0.02, 0.08),
        choice_seeds=range(100, 104),
    )
