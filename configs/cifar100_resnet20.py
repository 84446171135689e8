"""ResNet-20 on CIFAR-100 from a full-precision partner, W2A2 by default.

Needs CIFAR-100 as a prepared TensorFlow Dataset (see README). There is no common recipe for it. This one uses the
settings of the authors' code of APoT (arXiv 1909.13144, yhhhli/APoT_Quantization) for ResNet-20 on CIFAR-10: 300
epochs, batch 128, SGD with momentum 0.9 at 0.04, weight decay 1e-4 at 3 and 4 bits and 3e-5 at 2. For comparison,
SQAKD's scripts (kaiqi123/SQAKD) have for ResNet-32 on CIFAR-100: 720 epochs, batch 64, Adam at 5e-4 for weights and at
5e-6 for quantizers, weight decay 5e-4.

Ours: cosine decay, where APoT has a tenth of the learning rate from epochs 150 and 225 on; training from the partner at
every number of bits, where APoT starts from the next higher one; LSQ, with the weights' learning rate for step sizes
(arXiv 1902.08153); 8 bits for the first and the last layer; block replacement.

Partner: without partner.torch_file or partner.workdir it is trained first, with the settings of the public weights
cifar100_resnet20 of chenyaofo/pytorch-cifar-models (200 epochs, SGD with Nesterov momentum at 0.1 with cosine decay,
weight decay 5e-4), except their batch of 256. Shortcuts (B) and normalisation are theirs too.

Command: python main.py --config=configs/cifar100_resnet20.py:bits=2,plan=prefix --config.data.dir=DIR
"""

from bqat_jax.experiment.configuration import Config
from configs.common import begin, use_small_images


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, depth, cut."""
    config, given = begin(argument, bits=2, depth=20)
    use_small_images(config, 'cifar100', (0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
    config.network.depth = given.depth
    config.network.shortcut = 'B'
    config.partner.epochs = 200.0
    config.partner.optimizer.learning_rate = 0.1
    config.partner.optimizer.weight_decay = 5e-4
    config.train.epochs = 300.0
    config.train.batch_size = 128
    config.optimizer.learning_rate = 0.04
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 1e-4 if given.bits > 2 else 3e-5
    config.optimizer.quantizers.learning_rate = 0.04
    return config
