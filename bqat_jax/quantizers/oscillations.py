"""Weights that oscillate between two codes, and two cures (Nagel et al., ICML 2022, arXiv 2203.11086).

Near a threshold the gradient pushes a weight across and back again, step after step. Dampening adds a loss that pulls
weights to the middle of their bin; freezing keeps the code of a weight that oscillates too often.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.base import Parameters

AGGREGATIONS = ('sum', 'kernel_mean')
# With more bits a weight's bin is so small that an oscillation does no harm; the paper's code tracks no more either.
MOST_BITS = 4


class Tracker(NamedTuple):
    """What is remembered of one weight tensor; every array has its shape.

    Attributes:
        codes: the integer codes after the last step, int8 or uint8.
        direction: the sign of the last change of each code, int8; 0 before the first.
        frequency: moving average of oscillations, float32.
        average: moving average of the codes, float32; the codes themselves as long as nothing is frozen.
        is_frozen: whether the code stays as it is from now on.
    """

    codes: jax.Array
    direction: jax.Array
    frequency: jax.Array
    average: jax.Array
    is_frozen: jax.Array


def can_freeze(quantizer: Quantizer) -> bool:
    """Whether a weight can be kept on its code by putting it on its level: not if its scale is read off the weights."""
    return quantizer.is_idempotent


def init_tracker(quantizer: Quantizer, parameters: Parameters, weights: jax.Array) -> Tracker:
    """Returns the tracker before the first step."""
    codes = quantizer.encode(parameters, weights)
    return Tracker(
        codes=codes,
        direction=jnp.zeros_like(codes, jnp.int8),
        frequency=jnp.zeros_like(codes, jnp.float32),
        average=codes.astype(jnp.float32),
        is_frozen=jnp.zeros_like(codes, bool),
    )


def track(tracker: Tracker, codes: jax.Array, momentum: float, threshold: jax.Array | float) -> Tracker:
    """Returns the tracker after a step that led to `codes`.

    A code oscillates when it changes against the direction of its last change. With m the momentum

        f <- m · oscillates + (1 - m) · f;   average <- m · code + (1 - m) · average

    and where f > threshold the code is frozen for good, at round(average) of the average before the step. As in the
    authors' code (Qualcomm-AI-research/oscillations-qat) the average begins at the codes when freezing does.

    Args:
        tracker: before the step.
        codes: of the weights after it.
        momentum: m, 0 to 1.
        threshold: infinity as long as nothing is to be frozen; oscillations are counted all the same.
    """
    change = jnp.sign(codes.astype(jnp.int16) - tracker.codes.astype(jnp.int16)).astype(jnp.int8)
    oscillates = (change * tracker.direction == -1).astype(jnp.float32)
    frequency = momentum * oscillates + (1 - momentum) * tracker.frequency
    freezes = (frequency > threshold) & ~tracker.is_frozen
    middle = jnp.round(tracker.average).astype(codes.dtype)
    values = codes.astype(jnp.float32)
    average = jnp.where(jnp.isinf(threshold), values, momentum * values + (1 - momentum) * tracker.average)
    return Tracker(
        codes=jnp.where(tracker.is_frozen, tracker.codes, jnp.where(freezes, middle, codes)),
        direction=jnp.where(change != 0, change, tracker.direction),
        frequency=jnp.where(tracker.is_frozen, tracker.frequency, frequency),
        average=jnp.where(tracker.is_frozen, tracker.average, average),
        is_frozen=tracker.is_frozen | freezes,
    )


def freeze(quantizer: Quantizer, parameters: Parameters, weights: jax.Array, tracker: Tracker) -> jax.Array:
    """Returns the weights with the frozen ones put on the level of their code; the scale still learns."""
    return jnp.where(tracker.is_frozen, quantizer.decode(parameters, tracker.codes, weights.dtype), weights)


def hold(quantizer: Quantizer, parameters: Parameters, tracker: Tracker, quantized: jax.Array) -> jax.Array:
    """Returns quantized weights with the frozen ones decoded from their codes.

    The values are the same. The gradients are those of a constant code: of y = s · code, dy/ds = code; and none of the
    weight.

    Args:
        quantizer: of the weights.
        parameters: its parameters, prepared.
        tracker: of the weights.
        quantized: the weights fake-quantized.
    """
    return jnp.where(tracker.is_frozen, quantizer.decode(parameters, tracker.codes, quantized.dtype), quantized)


def dampening_loss(quantizer: Quantizer, parameters: Parameters, weights: jax.Array, aggregation: str) -> jax.Array:
    """Returns Σ (w_q - clip(w, lowest, highest))², a scalar in float32, with a gradient for w alone.

    Inside the range it pulls a weight to its level; clipped weights get nothing. 'kernel_mean' sums over output
    channels and takes the mean over each kernel, as the authors' command line has it; 'sum' is the paper's formula.

    Args:
        quantizer: of the weights.
        parameters: its parameters.
        weights: output channels last.
        aggregation: 'sum' or 'kernel_mean'.

    Raises:
        ValueError: for another aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f'aggregation={aggregation!r}: it must be one of {", ".join(AGGREGATIONS)}.')
    fixed, values = jax.lax.stop_gradient((parameters, weights))
    lowest, highest = quantizer.limits(quantizer.prepare(fixed, values), weights.ndim)
    levels = quantizer.fake_quantize(fixed, values).astype(jnp.float32)
    x = weights.astype(jnp.float32)
    inside = (x > lowest) & (x < highest)
    loss = jnp.sum(jnp.where(inside, (levels - x) ** 2, 0.0))
    return loss / (weights.size // weights.shape[-1]) if aggregation == 'kernel_mean' else loss
