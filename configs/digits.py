"""W2A2 ResNet-8 on the handwritten digits of scikit-learn: a complete run in about two minutes.

On two slow CPU cores with other jobs (JAX 0.12.0.1): 2 to 4 minutes; test top-1 of seed 0: full precision 0.997, W2A2
0.994. With JAX 0.10.2, seeds 0 to 3: full precision 0.997, 0.997, 1.000, 0.989; W2A2 0.989, 0.997, 0.989, 0.994. One
test image is 0.003.

Command: python main.py
"""

from bqat_jax.experiment.configuration import Config
from configs.common import begin


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, cut."""
    config, _ = begin(argument, bits=2)
    config.data.name = 'digits'
    config.data.mean = (0.3054,)  # statistics of the training split's pixels
    config.data.std = (0.3760,)
    config.data.crop_padding = 1
    config.data.validation_fraction = 0.1
    config.network.depth = 8
    config.partner.epochs = 40.0
    config.partner.optimizer.learning_rate = 0.1
    config.partner.optimizer.warmup_epochs = 2.0
    config.partner.optimizer.weight_decay = 5e-4
    config.train.epochs = 60.0
    config.train.batch_size = 64
    config.optimizer.learning_rate = 0.02
    config.optimizer.quantizers.learning_rate = 0.02
    config.checkpoint.every_epochs = 5.0
    return config
