"""The optimizer: SGD with Nesterov momentum, cosine decay and warm-up; the quantizers' parameters apart."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bqat_jax.configuration import Config
from bqat_jax.errors import UserError
from bqat_jax.quantization.transform import WEIGHT_NAME

# The two groups of trainable parameters, the keys of `TrainState.params`.
NETWORK, QUANTIZERS = 'network', 'quantizers'


def learning_rate_schedule(peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns a linear warm-up from 0 to `peak` followed by a cosine decay to 0 at `steps`.

    Raises:
        UserError: if the warm-up does not fit.
    """
    if warmup_steps >= max(steps, 1):
        raise UserError(
            f'A warm-up of {warmup_steps} steps does not fit into {steps} steps of training; '
            "give fewer by the optimizer's warmup_steps."
        )
    start = 0.0 if warmup_steps else peak
    schedule = optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, max(steps, 1), end_value=0.0)
    # Optax mixes the integer step with floats, which strict dtype promotion forbids.
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def make_optimizer(
    config: Config, steps: int, warmup_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer over {'network': ..., 'quantizers': ...} and the network's learning rate by step.

    Weight decay is L2 regularisation added to the gradient before momentum, as PyTorch's SGD has it, on kernels alone:
    not on biases or batch norm. The quantizers' parameters have a learning rate and a weight decay of their own.

    Args:
        config: `config.optimizer`; without `quantizers`, only the network has a learning rate.
        steps: steps of training.
        warmup_steps: of them, with a rising learning rate.
    """
    schedule = learning_rate_schedule(config.learning_rate, steps, warmup_steps)
    groups: dict[Hashable, optax.GradientTransformation] = {
        NETWORK: optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_kernels),
            optax.sgd(schedule, config.momentum, config.nesterov),
        ),
        QUANTIZERS: optax.set_to_zero(),
    }
    if 'quantizers' in config:
        own = learning_rate_schedule(config.quantizers.learning_rate, steps, warmup_steps)
        groups[QUANTIZERS] = optax.chain(
            optax.add_decayed_weights(config.quantizers.weight_decay),
            optax.sgd(own, config.momentum, config.nesterov),
        )
    optimizer = optax.partition(groups, {NETWORK: NETWORK, QUANTIZERS: QUANTIZERS})
    if config.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, schedule


def _kernels(params: Any) -> Any:
    """True for kernels, false for biases and batch norm."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == WEIGHT_NAME, params)
