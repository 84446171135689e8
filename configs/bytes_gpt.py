"""A decoder-only transformer on the bytes of Python's standard library, W4A8, with layers as blocks.

The text is the library of the Python that prepares the data set; metadata and environment.json have its version. Loss:
cross entropy of the next byte; metric: bits per byte on files that were not trained on. The embedding and the head have
8 bits. With ternary weights distillation alone (plan=none) was better than prefix, which was worse than plain QAT; at
two bits prefix was not shown to differ from either (docs/results_small_data.md, "Bytes and pixels").

Command: python main.py --config=configs/bytes_gpt.py:bits=4,plan=prefix
"""

import ml_collections

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from configs.common import LSQ8, begin

LSQ, TERNARY = 'lsq', 'ternary'
# The embedding's and the head's, whatever the other layers have.
LSQ8_CHANNEL = {**LSQ8, 'granularity': 'channel'}


def get_config(argument: str | None = None) -> Config:
    """Returns the recipe; arguments: bits (of weights), weights (lsq, or ternary, of 2 bits), plan, distillation, cut.

    Raises:
        UserError: for other `weights`.
    """
    config, given = begin(argument, bits=4, weights=LSQ)
    if given.weights not in (LSQ, TERNARY):
        raise UserError(f'The config argument weights={given.weights!r} must be {LSQ} or {TERNARY}.')
    config.task = 'language_model'
    config.data.name = 'python_bytes'
    config.data.validation_split = 'validation'
    config.network = ml_collections.ConfigDict(
        {'name': 'decoder', 'depth': 4, 'width': 64, 'heads': 4, 'dtype': 'float32', 'unroll': True}
    )
    config.quant.weights.granularity = 'channel'
    if given.weights == TERNARY:
        config.quant.weights.name = 'absmean_ternary'
        config.quant.weights.bits = 2
        config.quant.weights.granularity = 'tensor'
    config.quant.activations.bits = 8
    config.quant.rules = (
        {'layers': 'embed', 'weights': dict(LSQ8_CHANNEL)},
        {'layers': 'head', 'weights': dict(LSQ8_CHANNEL), 'activations': dict(LSQ8)},
    )
    config.train.batch_size = 32
    config.partner.steps = 2000
    config.train.steps = 1000
    for optimizer, rate in ((config.partner.optimizer, 0.006), (config.optimizer, 0.001)):
        optimizer.name = 'adamw'
        optimizer.learning_rate = rate
        optimizer.beta2 = 0.99
        optimizer.weight_decay = 0.01
        optimizer.clip_norm = 1.0
        optimizer.warmup_steps = 100
    config.optimizer.quantizers.learning_rate = 0.001
    config.checkpoint.every_steps = 250
    return config
