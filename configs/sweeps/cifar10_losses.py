"""Whether methods differ by the learning rate that suits them: each at four rates, ResNet-20 on CIFAR-10 at W2A2.

Losses are summed, so a method with k losses of one size takes steps like plain QAT's at k times the rate. The held-out
images choose a rate, and two other seeds are trained with it. The schedule is cifar10_short.py's: 200 steps of 64.
A temperature of 4 softens the partner's answers, of which most are certain at a temperature of 1.

Command: python main.py --mode=sweep --config=configs/cifar10_resnet20.py \
    --config.sweep=configs/sweeps/cifar10_losses.py --config.data.dir=DIR --config.partner.torch_file=FILE \
    --workdir=runs/sweeps/cifar10_losses
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.cifar10_short import COMMON
from configs.sweeps.common import METHODS, bits, learning_rates, replacement

LOSSES = {
    'LSQ': METHODS['LSQ'],
    'distillation': METHODS['distillation'],
    'prefix': METHODS['prefix'],
    'distillation, T 4': {'plan': 'none', 'temperature': 4.0},
    'prefix, T 4': {'plan': 'prefix', 'temperature': 4.0},
}


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={name: {**COMMON, **replacement(**keys)} for name, keys in LOSSES.items()},
        seeds=range(2),
        baseline='LSQ',
        settings={name: {**keys, 'train.steps': 200} for name, keys in bits(2).items()},
        choices=learning_rates(0.0005, 0.001, 0.002, 0.004),
        choice_seeds=[100],
    )
