"""The optimizer: SGD or AdamW with warm-up and cosine decay; quantizer parameters are a separate group."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bqat_jax.errors import UserError
from bqat_jax.training.spec import NETWORK, QUANTIZERS
from bqat_jax.transform import WEIGHT_NAME

NAMES = ('sgd', 'adamw')
PEAK = 'peak_learning_rate'  # its name in the optimizer's state


@dataclasses.dataclass(frozen=True)
class Rates:
    """Hyperparameters of a group of parameters.

    Attributes:
        learning_rate: peak learning rate.
        weight_decay: weight decay.
    """

    learning_rate: float = 0.01
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """SGD or AdamW with a cosine decay and a linear warm-up.

    Attributes:
        name: 'sgd' or 'adamw'.
        learning_rate: peak learning rate of the network.
        momentum: momentum of SGD, beta1 of AdamW.
        beta2: beta2 of AdamW.
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: weight decay of kernels; SGD adds it to the gradient, AdamW decouples it.
        warmup_steps: number of warm-up steps.
        clip_norm: largest global norm of the gradient; 0 disables clipping.
        quantizers: hyperparameters of the quantizers' parameters; None for a network without quantizers.

    Raises:
        ValueError: for an unknown name.
    """

    name: str = 'sgd'
    learning_rate: float = 0.1
    momentum: float = 0.9
    beta2: float = 0.999
    nesterov: bool = True
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    clip_norm: float = 0.0
    quantizers: Rates | None = Rates()

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f'optimizer.name={self.name!r}: must be one of {", ".join(NAMES)}.')


def learning_rate_schedule(peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns a linear warm-up from 0 to `peak` followed by a cosine decay to 0 at `steps`.

    Raises:
        UserError: if the warm-up is not shorter than training.
    """
    if warmup_steps >= max(steps, 1):
        raise UserError(
            f'A warm-up of {warmup_steps} steps does not fit into {steps} steps of training. '
            "Decrease the optimizer's warmup_steps."
        )
    start = 0.0 if warmup_steps else peak
    schedule = optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, max(steps, 1), end_value=0.0)
    # Optax mixes the integer step with floats, which strict dtype promotion forbids.
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


LearningRate = Callable[[Any, jax.Array], jax.Array]


def make_optimizer(spec: OptimizerSpec, steps: int) -> tuple[optax.GradientTransformation, LearningRate]:
    """Returns the optimizer over {'network': ..., 'quantizers': ...}, and the network's learning rate.

    The learning rate is a function of the optimizer's state and the step: peak learning rates are values in the state
    instead of constants, so that one compiled program serves all of them.

    Weight decay applies to kernels only: not to biases, norms, class tokens or positions. With 'sgd' it is L2
    regularisation added to the gradient before momentum, as in PyTorch's SGD; with 'adamw' it is decoupled from the
    gradient, times the learning rate (arXiv 1711.05101). The quantizers' parameters have a separate learning rate and
    weight decay.

    Args:
        spec: the optimizer's settings.
        steps: number of training steps.

    Raises:
        UserError: if the warm-up is not shorter than training.
    """
    schedule = learning_rate_schedule(1.0, steps, spec.warmup_steps)
    groups: dict[Hashable, optax.GradientTransformation] = {
        NETWORK: _make_rule(spec, schedule, Rates(spec.learning_rate, spec.weight_decay), _kernels),
        QUANTIZERS: optax.set_to_zero(),
    }
    if spec.quantizers is not None:
        groups[QUANTIZERS] = _make_rule(spec, schedule, spec.quantizers, None)
    optimizer = optax.partition(groups, {NETWORK: NETWORK, QUANTIZERS: QUANTIZERS})
    if spec.clip_norm > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(spec.clip_norm), optimizer)

    def learning_rate(opt_state: Any, step: jax.Array) -> jax.Array:
        peak = optax.tree.get(opt_state, PEAK, filtering=lambda path, _: jax.tree_util.DictKey(NETWORK) in path)
        return peak * jnp.asarray(schedule(step), jnp.float32)

    return optimizer, learning_rate


def _make_rule(spec: OptimizerSpec, schedule: optax.Schedule, rates: Rates, mask: Any) -> optax.GradientTransformation:
    """Returns the update rule of one group, with weight decay where `mask` is true, or everywhere if it is None."""
    unit_rule = _make_unit_rule(spec, schedule, rates.weight_decay, mask)
    return optax.chain(unit_rule, optax.inject_hyperparams(_scale_by_peak)(**{PEAK: rates.learning_rate}))


def _make_unit_rule(
    spec: OptimizerSpec, schedule: optax.Schedule, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """Returns the update rule of one group at a peak learning rate of 1."""
    if spec.name == 'adamw':
        adamw = optax.adamw(schedule, spec.momentum, spec.beta2, weight_decay=weight_decay, mask=mask)
        # Optax raises floats to the power of the integer step, which strict dtype promotion forbids.
        update = jax.numpy_dtype_promotion('standard')(adamw.update)
        return optax.GradientTransformation(adamw.init, update)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, spec.momentum, spec.nesterov),
    )


def _scale_by_peak(peak_learning_rate: Any) -> optax.GradientTransformation:
    return optax.scale(peak_learning_rate)


def _kernels(params: Any) -> Any:
    """Returns a mask that is true for kernels only."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == WEIGHT_NAME, params)
