"""Statistics for initial scales, per tensor or per channel, with fallbacks for all-zero data."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.quantizers.base import Quantizer, positive_or

OCTAV_ITERATIONS = 20
# The search for the range of least error uses at most this many values, and this many candidates per end.
SEARCHED_VALUES = 8192
SEARCHED_FRACTIONS = 20
GOLDEN_STEPS = 60


def mean_magnitude(quantizer: Quantizer, v: jax.Array) -> jax.Array:
    """Returns mean|v| per tensor or channel, float32; a zero is replaced by the tensor's mean|v|, or by 1."""
    return _with_fallback(quantizer, v, lambda x, axes: jnp.mean(jnp.abs(x), axis=axes))


def maximum_magnitude(quantizer: Quantizer, v: jax.Array) -> jax.Array:
    """Returns max|v| per tensor or channel, with the fallbacks of `mean_magnitude`."""
    return _with_fallback(quantizer, v, lambda x, axes: jnp.max(jnp.abs(x), axis=axes))


def standard_deviation(quantizer: Quantizer, v: jax.Array) -> jax.Array:
    """Returns the standard deviation per tensor or channel, float32; max|v| for constants."""
    largest = maximum_magnitude(quantizer, v)
    # Normalized to at most 1, because squares of large numbers overflow.
    units = v.astype(jnp.float32) / quantizer.broadcast(largest, v.ndim)
    return positive_or(jnp.std(units, axis=quantizer.shared_axes(v.ndim)), 1.0) * largest


def root_mean_square(quantizer: Quantizer, v: jax.Array) -> jax.Array:
    """Returns sqrt(mean(v²)) per tensor or channel, with the fallbacks of `mean_magnitude`."""
    largest = maximum_magnitude(quantizer, v)
    units = v.astype(jnp.float32) / quantizer.broadcast(largest, v.ndim)
    return positive_or(jnp.sqrt(jnp.mean(units**2, axis=quantizer.shared_axes(v.ndim))), 1.0) * largest


def _with_fallback(
    quantizer: Quantizer, v: jax.Array, statistic: Callable[[jax.Array, tuple[int, ...]], jax.Array]
) -> jax.Array:
    x = v.astype(jnp.float32)
    whole = positive_or(statistic(x, tuple(range(v.ndim))), 1.0)
    if quantizer.channel_axis is None:
        return whole
    return positive_or(statistic(x, quantizer.shared_axes(v.ndim)), whole)


def optimal_clip(quantizer: Quantizer, v: jax.Array) -> jax.Array:
    """Returns the clipping value of least mean squared error (OCTAV: Sakr et al., ICML 2022, arXiv 2206.06501).

        s <- Σ|x| [|x| > s] / ( noise · Σ [0 < |x| <= s] + Σ [|x| > s] ),   noise = 4^-B / 3

    The iteration runs 20 Newton steps. 4^-B / 3 is Δ² / (12 s²) for the step Δ = 2s / 2^B of a signed grid; for
    unsigned grids Δ is s / (2^B - 1) (ours). If no value exceeds s, s does not change, so a constant is its own clip.

    Returns:
        float32 () or (channels,), positive.
    """
    axes = quantizer.shared_axes(v.ndim)
    x = jnp.abs(v.astype(jnp.float32))
    noise = 4.0**-quantizer.bits / 3 if quantizer.signed else 1 / (12 * (2.0**quantizer.bits - 1) ** 2)

    def total(mask, values):
        return jnp.sum(jnp.where(mask, values, 0.0), axis=axes)

    def update(_, clip):
        above = x > quantizer.broadcast(clip, v.ndim)
        inside = total((x > 0) & ~above, jnp.ones_like(x))
        new = total(above, x) / jnp.maximum(noise * inside + total(above, jnp.ones_like(x)), 1e-30)
        return jnp.where(jnp.any(above, axis=axes), new, clip)

    start = total(x > 0, x) / jnp.maximum(total(x > 0, jnp.ones_like(x)), 1.0)
    clip = jax.lax.fori_loop(0, OCTAV_ITERATIONS, update, start)
    return positive_or(clip, maximum_magnitude(quantizer, v))


def range_of_least_error(v: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest and highest of `codes` equidistant levels that quantize v with the least squared error.

    The search tries fractions of the data's minimum and maximum, on a sample of the values with a fixed stride.

    Args:
        v: floating-point array.
        codes: number of levels, at least 2.

    Returns:
        Two ascending float32 scalars; 0 and codes - 1 for all-zero data.
    """
    x = v.astype(jnp.float32).reshape(-1)
    x = x[:: max(1, -(-x.size // SEARCHED_VALUES))]
    fractions = np.linspace(1 / SEARCHED_FRACTIONS, 1, SEARCHED_FRACTIONS, dtype=np.float32)
    # The range always includes zero.
    lows = jnp.minimum(jnp.min(x), 0.0) * np.repeat(fractions, SEARCHED_FRACTIONS)
    highs = jnp.maximum(jnp.max(x), 0.0) * np.tile(fractions, SEARCHED_FRACTIONS)

    def error(ends):
        low, high = ends
        step = jnp.maximum((high - low) / (codes - 1), 1e-30)
        y = jnp.clip(jnp.round((x - low) / step), 0, codes - 1) * step + low
        return jnp.sum((x - y) ** 2)

    best = jnp.argmin(jax.lax.map(error, (lows, highs)))
    low, high = lows[best], highs[best]
    empty = high - low <= 1e-12
    return jnp.where(empty, 0.0, low), jnp.where(empty, float(codes - 1), high)


@functools.cache
def normal_step(lower: int, upper: int) -> float:
    """Returns the step that quantizes a standard normal to lower .. upper with the least mean squared error.

    If lower is 0, the distribution is half-normal. The step comes from a golden-section search on a fine grid of the
    density.
    """
    x = np.linspace(0.0 if lower == 0 else -8.0, 8.0, 40001)
    weights = np.exp(-(x**2) / 2)

    def error(step):
        return float(np.sum(weights * (x - step * np.clip(np.rint(x / step), lower, upper)) ** 2))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = 1e-3, 4.0
    for _ in range(GOLDEN_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return (low + high) / 2
