"""DeiT-tiny on ImageNet from a full-precision partner, W4A4 by default.

The recipe is that of OFQ (arXiv 2302.02210), from its authors' scripts (nbasyl/OFQ) for DeiT-tiny with a distillation
token, which ours does not have: AdamW from full-precision weights with the full-precision network as teacher, 300
epochs, learning rate 5e-4 per 512 images after 5 epochs of warm-up, weight decay 0.05 for all bits, no mixup or cutmix,
weights with one scale per channel. For comparison, Q-ViT of NeurIPS 2022 (YanjingLi0202/Q-ViT) has LAMB at 3e-4, batch
512, no weight decay and no warm-up. The other Q-ViT (arXiv 2201.07703) was not checked.

Ours: the quantizers' learning rate of 1e-5, which is that of Adam in the code of EWGS (arXiv 2104.00903); 8 bits for
the patch embedding and the head, as usual for convolutional networks; LSQ for inputs and weights, where OFQ has its own
quantizer of weights and reparametrizes queries and keys; block replacement. OFQ also has RandAugment and random
erasing, which this recipe lacks.

Partner: timm's deit_tiny_patch16_224, with --config.partner.torch_file=FILE; Hugging Face's
facebook/deit-tiny-patch16-224 needs --config.network.norm_epsilon=1e-12. Use one of them: without a file the partner is
trained first with this learning rate and weight decay, but DeiT's accuracy needs its augmentation too.

Command: python main.py --config=configs/imagenet_deit_tiny.py:bits=4,plan=prefix --config.data.dir=DIR
"""

import ml_collections

from bqat_jax.experiment.configuration import Config
from configs.common import LSQ8, begin, use_imagenet


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), plan, distillation, cut."""
    config, _ = begin(argument, bits=4)
    use_imagenet(config)
    config.network = ml_collections.ConfigDict(
        {'name': 'vit', 'size': 'tiny', 'patch_size': 16, 'norm_epsilon': 1e-6, 'dtype': 'float32', 'remat': False}
    )
    config.quant.weights.granularity = 'channel'
    config.quant.rules = (
        {'layers': 'stem/patch_embed', 'weights': dict(LSQ8), 'activations': dict(LSQ8)},
        {'layers': 'head/dense', 'weights': dict(LSQ8), 'activations': dict(LSQ8)},
    )
    config.partner.epochs = 300.0
    config.train.epochs = 300.0
    config.train.batch_size = 512
    for optimizer in (config.partner.optimizer, config.optimizer):
        optimizer.name = 'adamw'
        optimizer.learning_rate = 5e-4
        optimizer.weight_decay = 0.05
        optimizer.warmup_epochs = 5.0
    config.optimizer.quantizers.learning_rate = 1e-5
    return config
