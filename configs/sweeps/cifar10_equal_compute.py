"""ResNet-20 on CIFAR-10 from a trained partner, at equal compute: 5,000 units, which are 4.7 epochs of plain QAT.

All methods have the compute of 1,667 steps of LSQ, by the units of docs/method.md. Rates are the best of those that
were tried at W2A2 (docs/results.md); at W3A3 no other was tried.

Command: python main.py --mode=sweep --config=configs/cifar10_resnet20.py \
    --config.sweep=configs/sweeps/cifar10_equal_compute.py --config.data.dir=DIR --config.partner.torch_file=FILE \
    --workdir=runs/sweeps/cifar10_equal_compute
"""

from bqat_jax.sweeps import Sweep
from configs.sweeps.common import COMPARED, METHODS, UNITS, bits, learning_rates, replacement

UNITS_OF_A_RUN = 5_000
RATES = {'LSQ': 0.03, 'distillation': 0.01, 'prefix': 0.01, 'prefix_sampled': 0.01}


def method(name):
    """Returns the overrides of a method."""
    steps = round(UNITS_OF_A_RUN / UNITS[name])
    return {
        **replacement(**METHODS[name], temperature=4.0),
        **learning_rates(RATES[name])[0],
        'train.steps': steps,
        'checkpoint.every_steps': steps,
        'optimizer.warmup_epochs': 0.0,
        'optimizer.warmup_steps': steps // 20,
        'data.validation_fraction': 0.1,
    }


def get_sweep() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        methods={name: method(name) for name in COMPARED},
        seeds=range(2),
        baseline='LSQ',
        settings=bits(2, 3),
    )
