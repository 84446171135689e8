"""The optimizer: SGD or AdamW, cosine decay and warm-up; the quantizers' parameters apart."""

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
    """How a group of parameters is trained.

    Attributes:
        learning_rate: peak learning rate.
        weight_decay: of the group.
    """

    learning_rate: float = 0.01
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """SGD or AdamW with a cosine decay and a linear warm-up.

    Attributes:
        name: 'sgd' or 'adamw'.
        learning_rate: peak learning rate of the network.
        momentum: of SGD; of AdamW it is beta1.
        beta2: of AdamW.
        nesterov: of SGD.
        weight_decay: of kernels; SGD adds it to the gradient, AdamW decouples it.
        warmup_steps: steps with a rising learning rate.
        clip_norm: largest norm of the whole gradient; 0 for none.
        quantizers: of the quantizers' parameters; None for a network that has none.

    Raises:
        ValueError: for a name that does not exist.
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
            raise ValueError(f'optimizer.name={self.name!r}: it must be one of {", ".join(NAMES)}.')


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


LearningRate = Callable[[Any, jax.Array], jax.Array]


def make_optimizer(spec: OptimizerSpec, steps: int) -> tuple[optax.GradientTransformation, LearningRate]:
    """Returns the optimizer over {'network': ..., 'quantizers': ...}, and the network's learning rate.

    The latter is a function of the optimizer's state and the step: the peak learning rates are values in the state and
    no constants of the program, so that what was compiled for one serves all others.

    Weight decay is on kernels alone: not on biases, norms, class tokens or positions. With 'sgd' it is L2
    regularisation added to the gradient before momentum, as PyTorch's SGD has it; with 'adamw' it is decoupled from the
    gradient, times the learning rate (arXiv 1711.05101). The quantizers' parameters have a learning rate and a weight
    decay of their own.

    Args:
        spec: of the optimizer.
        steps: steps of training.

    Raises:
        UserError: for a warm-up that does not fit.
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
    """The update of one group; weight decay where the mask says so, everywhere if it is None."""
    unit_rule = _make_unit_rule(spec, schedule, rates.weight_decay, mask)
    return optax.chain(unit_rule, optax.inject_hyperparams(_scale_by_peak)(**{PEAK: rates.learning_rate}))


def _make_unit_rule(
    spec: OptimizerSpec, schedule: optax.Schedule, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """The update of one group at a peak learning rate of 1."""
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
    """True for kernels, false for all else."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == WEIGHT_NAME, params)
