"""Compares options of `prefix` in a harder setting on the digits: weights, temperature, cut, and terms of the loss.

The network is deeper than in the other sweeps, so that stages differ from residual blocks: six blocks in three stages.

Command: python main.py --mode=sweep \
    --config.sweep=configs/sweeps/digits_options.py --config.train.replicas=4 --workdir=runs/sweeps/digits_options
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import HARDER, METHODS, STEPS, learning_rates, replacement

OPTIONS = {
    'LSQ': METHODS['LSQ'],
    'distillation': METHODS['distillation'],
    'prefix': {},
    'prefix, w uniform': {'weights': 'uniform'},
    'prefix, w mean': {'weights': 'mean'},
    'prefix, T 4': {'temperature': 4.0},
    'prefix, labels alone': {'distillation': 0.0, 'path_distillation': 0.0},
    'prefix, cut block': {'cut': 'block'},
}


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={name: {**replacement(**keys), 'train.steps': STEPS} for name, keys in OPTIONS.items()},
        seeds=range(8),
        baseline='LSQ',
        settings={'narrow W2A2, depth 14': {**HARDER['narrow W2A2'], 'network.depth': 14}},
        choices=learning_rates(0.02, 0.08),
        choice_seeds=range(100, 104),
    )
