"""MobileNetV2 on ImageNet from a full-precision partner, W4A4 by default; meant for 3 bits and more.

The recipe is that of "Overcoming oscillations in quantization-aware training" (arXiv 2203.11086), from the authors'
code (Qualcomm-AI-research/oscillations-qat): 90 epochs, batch 128, LSQ with one scale per tensor, SGD with cosine decay
at 0.0033 and weight decay 5e-5 for 4 bits, 0.01 and 2.5e-5 for 3 bits; weights that oscillate are frozen at a frequency
that falls from 0.1 to 0.01 (0.011 for 3 bits), none in the first quarter; batch-norm statistics are re-estimated on 50
batches before every evaluation (here: after training). The first and the last layer have 8 bits. Depthwise layers have
the bits of the others; oscillation hurts them most. PROFIT (arXiv 2008.04693) instead trains with 8 and 5 bits first,
at a learning rate of 0.005.

Ours: the quantizers' learning rate, that of the weights as in LSQ (the code: Adam at 1e-5); the image has 8 bits too;
above 4 bits the settings of 4, at 2 bits those of 3; the argument depthwise, other bits for depthwise layers; block
replacement.

Partner: torchvision's or timm's mobilenet_v2, with --config.partner.torch_file=FILE (the code starts from another
file); Hugging Face's needs --config.network.padding=tf --config.network.norm_epsilon=0.001. Without a file the partner
is trained first with our own settings, which were not tuned.

Command: python main.py --config=configs/imagenet_mobilenet_v2.py:bits=4,plan=prefix --config.data.dir=DIR
"""

import ml_collections

from bqat_jax.experiment.configuration import Config
from configs.common import begin, use_imagenet


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights and activations), depthwise, plan, distillation, cut."""
    config, given = begin(argument, bits=4, depthwise=0)
    use_imagenet(config)
    config.network = ml_collections.ConfigDict(
        {
            'name': 'mobilenet_v2',
            'width_multiplier': 1.0,
            'padding': 'torch',
            'norm_epsilon': 1e-5,
            'norm_momentum': 0.9,
            'dtype': 'float32',
            'remat': False,
        }
    )
    if given.depthwise:
        bits = {'bits': given.depthwise}
        rule = {'layers': '.*/depthwise/conv', 'weights': dict(bits), 'activations': dict(bits)}
        config.quant.rules = (*config.quant.rules, rule)
    config.quant.oscillations.freezing = True
    config.quant.oscillations.freezing_threshold = 0.01 if given.bits >= 4 else 0.011
    config.quant.reestimation_batches = 50
    config.partner.epochs = 150.0
    config.partner.optimizer.learning_rate = 0.025
    config.partner.optimizer.weight_decay = 4e-5
    config.partner.optimizer.warmup_epochs = 5.0
    config.train.epochs = 90.0
    config.train.batch_size = 128
    config.optimizer.learning_rate = 0.0033 if given.bits >= 4 else 0.01
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-5 if given.bits >= 4 else 2.5e-5
    config.optimizer.quantizers.learning_rate = config.optimizer.learning_rate
    return config
