"""ResNet-18 on ImageNet from a full-precision partner, W2A2 by default.

The recipe is LSQ's (arXiv 1902.08153): SGD from full-precision weights, cosine decay; step sizes are learned with the
weights' learning rate, their gradients scaled; the first and the last layer have 8 bits. Weight decay is 1e-4, half of
it at 3 bits, a quarter at 2. The paper's text was not available: 90 epochs, batch 512, learning rate 0.01 and weight
decay 1e-4 at 4 bits are from a re-implementation (hustzxd/LSQuantization); the lower weight decays are unverified. For
comparison, the code of EWGS (arXiv 2104.00903) has 100 epochs, batch 256, SGD at 0.01 with weight decay 1e-4, and Adam
at 1e-5 for the quantizers.

Ours: block replacement; no weight decay on step sizes; the image has 8 bits too.

Partner: torchvision's resnet18 (IMAGENET1K_V1), with --config.partner.torch_file=FILE. Without it the partner is
trained first: 90 epochs, learning rate 0.1 per 256 images after 5 epochs of warm-up (arXiv 1706.02677), cosine decay
(ours).

Command: python main.py --config=configs/imagenet_resnet18.py:bits=2,plan=prefix --config.data.dir=DIR
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
        {'name': 'resnet', 'depth': 18, 'width': 64, 'dtype': 'float32', 'remat': False}
    )
    config.partner.epochs = 90.0
    config.partner.optimizer.learning_rate = 0.2
    config.partner.optimizer.nesterov = False
    config.partner.optimizer.warmup_epochs = 5.0
    config.train.epochs = 90.0
    config.train.batch_size = 512
    config.optimizer.learning_rate = 0.01
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = WEIGHT_DECAY.get(given.bits, 1e-4)
    config.optimizer.quantizers.learning_rate = 0.01
    return config
