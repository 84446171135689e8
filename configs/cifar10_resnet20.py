"""ResNet-20 on CIFAR-10 from a full-precision partner, W2A2 by default.

Needs CIFAR-10 as a prepared TensorFlow Dataset (docs/data.md). Temperature, learning rate and the warm-up of a
twentieth are for a partner with trained weights, at two bits: over five epochs a temperature of 4 was better than 1,
and with it 0.01 better than 0.02 (docs/results.md). The schedule of 100 epochs was not run. Plain QAT takes larger
rates: 0.02 over 31 epochs, 0.03 over five. Shorter schedules need smaller rates, and optimizer.warmup_epochs=0.
Without partner.torch_file or partner.workdir the partner is trained first (240 epochs).

Command: python main.py --config=configs/cifar10_resnet20.py:bits=2,plan=prefix --config.data.dir=DIR
"""

from bqat_jax.experiment.configuration import Config
from configs.common import begin, use_small_images


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, depth, cut."""
    config, given = begin(argument, bits=2, depth=20)
    # The constants of the public ResNet-20 weights (akamaster/pytorch_resnet_cifar10), which are ImageNet's.
    use_small_images(config, 'cifar10', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    config.network.depth = given.depth
    config.partner.epochs = 240.0
    config.partner.optimizer.learning_rate = 0.1
    config.partner.optimizer.warmup_epochs = 1.0
    config.train.epochs = 100.0
    config.train.batch_size = 128
    config.replacement.temperature = 4.0
    config.optimizer.learning_rate = 0.01
    config.optimizer.quantizers.learning_rate = 0.01
    config.optimizer.warmup_epochs = 5.0
    return config
