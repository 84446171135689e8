"""ResNet-20 on CIFAR-10 from a trained partner: a short schedule for CPUs.

Steps have 64 images: 200 steps are 0.9 epochs of the 14,000 images that are used. The full schedule: cifar10_full.py.

Command: python main.py --mode=sweep --config=configs/cifar10_resnet20.py \
    --config.sweep=configs/sweeps/cifar10_short.py --config.data.dir=DIR --config.partner.torch_file=FILE \
    --workdir=runs/sweeps/cifar10_short
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import COMPARED, METHODS, bits, learning_rates, replacement

COMMON = {
    'replacement.temperature': 1.0,  # the recipe has 4
    'optimizer.warmup_epochs': 0.0,
    'train.batch_size': 64,
    'data.train_examples': 16_000,
    'data.validation_fraction': 0.125,
    'checkpoint.every_epochs': 1.0,
}
STEPS = {'W2A2': 200, 'W4A4': 80}


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={name: {**COMMON, **replacement(**METHODS[name])} for name in COMPARED},
        seeds=range(2),
        baseline='LSQ',
        settings={name: {**keys, 'train.steps': STEPS[name]} for name, keys in bits(2, 4).items()},
        choices=learning_rates(0.0008, 0.002),
        choice_seeds=[100],
    )
