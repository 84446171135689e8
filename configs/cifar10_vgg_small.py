"""VGG-small on CIFAR-10 from a full-precision partner, W2A2 by default.

Needs CIFAR-10 as a prepared TensorFlow Dataset (see README). The recipe is that of LQ-Nets (arXiv 1807.10029), from its
authors' code (microsoft/LQ-Nets): 400 epochs, batch 100, SGD with momentum 0.9 at 0.02, weight decay 5e-4 for all bits,
crops after padding by 4 pixels, and flips. For comparison: EWGS (arXiv 2104.00903) and SQAKD have 400 epochs, batch
256, and Adam at 1e-3 for weights, at 1e-5 for quantizers, from full-precision weights.

Ours: cosine decay, where LQ-Nets has a tenth of the learning rate from epochs 80, 160 and 300 on; training from the
partner, where LQ-Nets starts from scratch; the quantizers' learning rate, that of the weights as in LSQ (arXiv
1902.08153); 8 bits for the first and the last layer, which LQ-Nets leaves in full precision; EWGS' normalisation; block
replacement.

Partner: public weights are hard to find; without partner.torch_file or partner.workdir it is trained first, with the
settings of LQ-Nets and cosine decay.

Command: python main.py --config=configs/cifar10_vgg_small.py:bits=2,plan=prefix --config.data.dir=DIR
"""

import ml_collections

from bqat_jax.experiment.configuration import Config
from configs.common import begin, use_small_images


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, cut."""
    config, _ = begin(argument, bits=2)
    use_small_images(config, 'cifar10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    config.network = ml_collections.ConfigDict({'name': 'vgg_small', 'width': 128, 'dtype': 'float32', 'remat': False})
    config.partner.epochs = 400.0
    config.train.epochs = 400.0
    config.train.batch_size = 100
    for optimizer in (config.partner.optimizer, config.optimizer):
        optimizer.learning_rate = 0.02
        optimizer.nesterov = False
        optimizer.weight_decay = 5e-4
    config.optimizer.quantizers.learning_rate = 0.02
    return config
