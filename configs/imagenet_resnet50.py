"""ResNet-50 on ImageNet from a full-precision partner, W2A2 by default.

The recipe is that of configs/imagenet_resnet18.py, LSQ's (arXiv 1902.08153): SGD at 0.01 for weights and step sizes,
cosine decay, 90 epochs, the first and the last layer in 8 bits, weight decay 1e-4, half of it at 3 bits, a quarter at
2. That file has the sources; that LSQ trains ResNet-50 with these numbers was not verified.

Ours: batch 256 with learning rate 0.01, as in the code of EWGS (arXiv 2104.00903) for ResNet-18 and -34, because frozen
suffixes run beside the network; block replacement; no weight decay on step sizes. If memory is short:
--config.network.remat=True.

Partner: torchvision's resnet50, with --config.partner.torch_file=FILE. IMAGENET1K_V1 is the usual one; IMAGENET1K_V2 is
this network trained with a longer recipe. Without a file the partner is trained first: 90 epochs, learning rate 0.1
after 5 epochs of warm-up (arXiv 1706.02677), cosine decay (ours).

Command: python main.py --config=configs/imagenet_resnet50.py:bits=2,plan=prefix --config.data.dir=DIR
"""

import ml_collections

from bqat_jax.experiment.configuration import Config
from configs.common import begin, use_imagenet

WEIGHT_DECAY = {2: 0.25e-4, 3: 0.5e-4}  # by bits; 1e-4 from 4 bits on


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, cut."""
    config, given = begin(argument, bits=2)
    use_imagenet(config)
    config.network = ml_collections.ConfigDict(
        {'name': 'resnet', 'depth': 50, 'width': 64, 'dtype': 'float32', 'remat': False}
    )
    config.partner.epochs = 90.0
    config.partner.optimizer.learning_rate = 0.1
    config.partner.optimizer.nesterov = False
    config.partner.optimizer.warmup_epochs = 5.0
    config.train.epochs = 90.0
    config.train.batch_size = 256
    config.optimizer.learning_rate = 0.01
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = WEIGHT_DECAY.get(given.bits, 1e-4)
    config.optimizer.quantizers.learning_rate = 0.01
    return config
