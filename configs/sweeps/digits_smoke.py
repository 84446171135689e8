"""A smoke test of sweeps: two methods, two seeds, a few steps. Its numbers mean nothing.

Command: python main.py --mode=sweep --config.sweep=configs/sweeps/digits_smoke.py --workdir=runs/smoke
"""

from bqat_jax.sweeps import Sweep


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={
            'LSQ': {'replacement.plan': 'none', 'replacement.distillation': 0.0, 'train.steps': 20},
            'prefix': {'replacement.plan': 'prefix', 'train.steps': 20},
        },
        seeds=range(2),
        baseline='LSQ',
    )
