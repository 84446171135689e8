"""Oscillating weights: tracking, dampening and freezing (Nagel et al., ICML 2022, arXiv 2203.11086).

Near a threshold, gradients push a weight back and forth between two codes. Dampening adds a loss that pulls weights to
the middle of their bin; freezing fixes the code of a weight that oscillates too often.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.base import Parameters

AGGREGATIONS = ('sum', 'kernel_mean')
# With more bits, bins are so small that oscillations are harmless; the paper's code has the same limit.
MOST_BITS = 4


class Tracker(NamedTuple):
    """Oscillation statistics of one weight tensor; every array has its shape.

    Attributes:
        codes: the integer codes after the last step, int8 or uint8.
        direction: the sign of the last change of each code, int8; 0 before the first change.
        frequency: moving average of oscillations, float32.
        average: moving average of the codes, float32; equal to the codes until freezing starts.
        is_frozen: whether the code is fixed, bool.
    """

    codes: jax.Array
    direction: jax.Array
    frequency: jax.Array
    average: jax.Array
    is_frozen: jax.Array


def can_freeze(quantizer: Quantizer) -> bool:
    """Returns whether weights can be frozen on their levels: not if the scale is computed from the weights."""
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

    A code oscillates when it changes in the opposite direction of its last change. With momentum m,

        f <- m · oscillates + (1 - m) · f;   average <- m · code + (1 - m) · average

    A code with f > threshold is frozen permanently, at round(average) with the average before the step. As in the
    authors' code (Qualcomm-AI-research/oscillations-qat), the average starts at the codes when freezing starts.

    Args:
        tracker: the tracker before the step.
        codes: the codes of the weights after the step.
        momentum: m, 0 to 1.
        threshold: infinity disables freezing; oscillations are still tracked.
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
    """Returns the weights with each frozen weight set to the level of its code; the scale is still trained."""
    return jnp.where(tracker.is_frozen, quantizer.decode(parameters, tracker.codes, weights.dtype), weights)


def hold(quantizer: Quantizer, parameters: Parameters, tracker: Tracker, quantized: jax.Array) -> jax.Array:
    """Returns quantized weights with the frozen ones decoded from their codes.

    Values do not change. Gradients of a frozen weight are those of a constant code: for y = s · code, dy/ds = code and
    dy/dw = 0.

    Args:
        quantizer: the weights' quantizer.
        parameters: its prepared parameters.
        tracker: the weights' tracker.
        quantized: the fake-quantized weights.
    """
    return jnp.where(tracker.is_frozen, quantizer.decode(parameters, tracker.codes, quantized.dtype), quantized)


def dampening_loss(quantizer: Quantizer, parameters: Parameters, weights: jax.Array, aggregation: str) -> jax.Array:
    """Returns Σ (w_q - clip(w, lowest, highest))², a float32 scalar with a gradient for w only.

    The loss pulls weights inside the range to their levels; clipped weights contribute nothing. 'sum' is the paper's
    formula; 'kernel_mean' sums over output channels and averages over each kernel, as in the authors' command line.

    Args:
        quantizer: the weights' quantizer.
        parameters: its parameters.
        weights: the weights, output channels last.
        aggregation: 'sum' or 'kernel_mean'.

    Raises:
        ValueError: for another aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f'aggregation={aggregation!r}: must be one of {", ".join(AGGREGATIONS)}.')
    fixed, values = jax.lax.stop_gradient((parameters, weights))
    lowest, highest = quantizer.limits(quantizer.prepare(fixed, values), weights.ndim)
    levels = quantizer.fake_quantize(fixed, values).astype(jnp.float32)
    x = weights.astype(jnp.float32)
    inside = (x > lowest) & (x < highest)
    loss = jnp.sum(jnp.where(inside, (levels - x) ** 2, 0.0))
    return loss / (weights.size // weights.shape[-1]) if aggregation == 'kernel_mean' else loss
