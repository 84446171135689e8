"""Compares the methods of digits.py in the harder settings at equal compute: the cheaper a step, the more steps.

Units of a step for three equal blocks (docs/method.md): 3 LSQ, 4 distillation, 6 `prefix`, 5 `prefix_sampled`, 5.11
`single_sampled`, 4.63 `bernoulli` (half to all blocks low precision). All have the compute of 160 steps of `prefix`.

Command: python main.py --mode=sweep \
    --config.sweep=configs/sweeps/digits_equal_compute.py --config.train.replicas=4 \
    --workdir=runs/sweeps/digits_equal_compute
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import HARDER, METHODS, STEPS, learning_rates, replacement

UNITS = {
    'LSQ': 3,
    'distillation': 4,
    'prefix': 6,
    'prefix_sampled': 5,
    'single_sampled': 46 / 9,
    'bernoulli': 4 + 0.6316,
}


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
