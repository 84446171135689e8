"""ResNet-20 on CIFAR-10 from a trained partner: the full schedule, 100 epochs, for a GPU or TPU; we have not run it.

Command: python main.py --mode=sweep --config=configs/cifar10_resnet20.py \
    --config.sweep=configs/sweeps/cifar10_full.py --config.data.dir=DIR --config.partner.torch_file=FILE \
    --config.train.replicas=3 --workdir=runs/sweeps/cifar10_full
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import COMPARED, METHODS, bits, learning_rates, replacement


def get_sweep() -> Sweep:
    """Returns the sweep."""
    # At T = 4, the recipe's, schedules of up to five epochs end far better (docs/results.md); for this one it is open.
    at_one = {f'{name}, T 1': {**METHODS[name], 'temperature': 1.0} for name in ('distillation', 'prefix')}
    compared = {**{name: METHODS[name] for name in COMPARED}, **at_one}
    common = {'train.epochs': 100.0, 'data.validation_fraction': 0.1, 'checkpoint.every_epochs': 10.0}
    return Sweep(
        methods={name: {**replacement(**keys), **common} for name, keys in compared.items()},
        seeds=range(3),
        baseline='LSQ',
        settings=bits(2, 3, 4),
        choices=learning_rates(0.005, 0.01, 0.02, 0.04),
        choice_seeds=range(100, 103),
    )
