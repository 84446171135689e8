"""Methods, settings of the digits, and choices that the sweeps share."""

STEPS = 160

# Changes to plain QAT.
METHODS = {
    'LSQ': {'plan': 'none', 'distillation': 0.0},
    'distillation': {'plan': 'none'},
    'prefix': {'plan': 'prefix'},
    'prefix_sampled': {'plan': 'prefix_sampled'},
    'single_sampled': {'plan': 'single_sampled'},
    'bernoulli': {'plan': 'bernoulli'},
}

# Compute of a step for three equal blocks (docs/method.md); `bernoulli` with half to all blocks in low precision.
UNITS = {
    'LSQ': 3,
    'distillation': 4,
    'prefix': 6,
    'prefix_sampled': 5,
    'single_sampled': 46 / 9,
    'bernoulli': 4 + 0.6316,
}

# Methods for CIFAR-10.
COMPARED = ('LSQ', 'distillation', 'prefix', 'prefix_sampled')

# A tenth of the images is too few to choose on.
COMMON = {'data.validation_fraction': 0.3, 'checkpoint.every_steps': 40, 'train.log_every_steps': 40}

# The network has three blocks of 16, 32 and 64 channels at width 16.
HARDER = {
    'narrow W2A2': {**COMMON, 'network.width': 4},
    'few images W2A2': {**COMMON, 'data.train_examples': 300, 'data.validation_fraction': 0.5, 'partner.steps': 800},
}
SETTINGS = {
    **HARDER,
    **{f'W{n}A{n}': {**COMMON, 'quant.weights.bits': n, 'quant.activations.bits': n} for n in (2, 3, 4)},
}


def replacement(**keys):
    """Returns overrides of `config.replacement`."""
    return {f'replacement.{key}': value for key, value in keys.items()}


def learning_rates(*rates):
    """Returns choices of a learning rate that network and quantizers share."""
    return [{'optimizer.learning_rate': rate, 'optimizer.quantizers.learning_rate': rate} for rate in rates]


def bits(*numbers):
    """Returns settings with these numbers of bits."""
    return {f'W{n}A{n}': {'quant.weights.bits': n, 'quant.activations.bits': n} for n in numbers}
