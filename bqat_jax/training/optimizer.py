"""The optimizer: SGD or AdamW, cosine decay and warm-up; the quantizers' parameters apart."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.transform import WEIGHT_NAME

# The two groups of trainable parameters, the keys of `TrainState.params`.
NETWORK, QUANTIZERS = 'network', 'quantizers'
NAMES = ('sgd', 'adamw')
PEAK = 'peak_learning_rate'  # its name in the optimizer's state


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


def check_optimizer(config: Config) -> None:
    """Raises UserError if a config of an optimizer has a name that does not exist."""
    if config.name not in NAMES:
        raise UserError(f'optimizer.name={config.name!r}: it must be one of {", ".join(NAMES)}.')


LearningRate = Callable[[Any, jax.Array], jax.Array]


def make_optimizer(config: Config, steps: int, warmup_steps: int) -> tuple[optax.GradientTransformation, LearningRate]:
    """Returns the optimizer over {'network': ..., 'quantizers': ...}, and the network's learning rate.

    The latter is a function of the optimizer's state and the step: the peak learning rates are values in the state and
    no constants of the program, so that what was compiled for one serves all others.

    Weight decay is on kernels alone: not on biases, norms, class tokens or positions. With 'sgd' it is L2
    regularisation added to the gradient before momentum, as PyTorch's SGD has it; with 'adamw' it is decoupled from the
    gradient, times the learning rate (arXiv 1711.05101). The quantizers' parameters have a learning rate and a weight
    decay of their own.

    Args:
        config: `config.optimizer`; without `quantizers`, only the network has a learning rate.
        steps: steps of training.
        warmup_steps: of them, with a rising learning rate.

    Raises:
        UserError: for a name that does not exist, or a warm-up that does not fit.
    """
    check_optimizer(config)
    schedule = learning_rate_schedule(1.0, steps, warmup_steps)
    groups: dict[Hashable, optax.GradientTransformation] = {
        NETWORK: _make_rule(config, schedule, config.learning_rate, config.weight_decay, _kernels),
        QUANTIZERS: optax.set_to_zero(),
    }
    if 'quantizers' in config:
        own = config.quantizers
        groups[QUANTIZERS] = _make_rule(config, schedule, own.learning_rate, own.weight_decay, None)
    optimizer = optax.partition(groups, {NETWORK: NETWORK, QUANTIZERS: QUANTIZERS})
    if config.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def learning_rate(opt_state: Any, step: jax.Array) -> jax.Array:
        peak = optax.tree.get(opt_state, PEAK, filtering=lambda path, _: jax.tree_util.DictKey(NETWORK) in path)
        return peak * jnp.asarray(schedule(step), jnp.float32)

    return optimizer, learning_rate


def _make_rule(
    config: Config, schedule: optax.Schedule, peak: float, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """The update of one group; weight decay where the mask says so, everywhere if it is None."""
    return optax.chain(
        _make_unit_rule(config, schedule, weight_decay, mask), optax.inject_hyperparams(_scale_by_peak)(**{PEAK: peak})
    )


def _make_unit_rule(
    config: Config, schedule: optax.Schedule, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """The update of one group at a peak learning rate of 1."""
    if config.name == 'adamw':
        adamw = optax.adamw(schedule, config.momentum, config.beta2, weight_decay=weight_decay, mask=mask)
        # Optax raises floats to the power of the integer step, which strict dtype promotion forbids.
        update = jax.numpy_dtype_promotion('standard')(adamw.update)
        return optax.GradientTransformation(adamw.init, update)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, config.momentum, config.nesterov),
    )


def _scale_by_peak(peak_learning_rate: Any) -> optax.GradientTransformation:
    return optax.scale(peak_learning_rate)


def _kernels(params: Any) -> Any:
    """True for kernels, false for all else."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == WEIGHT_NAME, params)
