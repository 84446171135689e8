"""A small UNet that labels every pixel of canvases with handwritten digits, W2A2.

The data set is made of scikit-learn's digits. Metric: the mean intersection over union (IoU) of the background and the
ten digits. The first and the last layer have 8 bits. Results: docs/results_small_data.md ("Bytes and pixels").

Command: python main.py --config=configs/digits_segmentation.py:bits=2,plan=prefix
"""

import ml_collections

from bqat_jax.experiment.configuration import Config
from configs.common import LSQ8, begin


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, cut."""
    config, _ = begin(argument, bits=2)
    config.task = 'segmentation'
    config.data.name = 'digits_segmentation'
    config.data.mean = (0.080,)  # statistics of the training split's pixels
    config.data.std = (0.234,)
    config.data.validation_fraction = 0.1
    config.network = ml_collections.ConfigDict({'name': 'unet', 'width': 16, 'levels': 2, 'dtype': 'float32'})
    config.quant.rules = tuple(
        {'layers': path, 'weights': dict(LSQ8), 'activations': dict(LSQ8)} for path in ('down1/conv1', 'head')
    )
    config.train.batch_size = 32
    config.partner.epochs = 12.0
    config.partner.optimizer.learning_rate = 0.1
    config.partner.optimizer.warmup_epochs = 0.5
    config.train.epochs = 8.0
    config.optimizer.learning_rate = 0.02
    config.optimizer.quantizers.learning_rate = 0.02
    config.checkpoint.every_epochs = 2.0
    return config
