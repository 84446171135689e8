"""Batch norm with a memory-efficient backward pass, optionally over separate groups of a batch."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.interception import intercept_methods, without_modules


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns x normalised by its mean and variance, and both (Ioffe and Szegedy, arXiv 1502.03167, section 3).

    y = (x - μ) / √(σ² + ε) · γ + β, with sums over the positions of each channel in each part. JAX's derivative saves
    x - μ in addition to x, and needs three sums over the batch instead of two; here only x is saved. Mean and variance
    are for the stored statistics: as results they have no gradient. There is no forward-mode derivative.

    Args:
        x: float32 (parts, examples, ..., channels).
        scale: γ, float32 (channels,).
        bias: β, float32 (channels,).
        epsilon: added to the variance.

    Returns:
        y in the shape of x; mean and variance, (parts, 1, ..., channels).
    """
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[Any, Any]:
    mean = _mean(x)
    variance = jnp.maximum(_mean(x * x) - mean * mean, 0.0)
    inverse: Any = jax.lax.rsqrt(variance + epsilon)
    y = (x - mean) * (inverse * _as_wide(scale, x)) + _as_wide(bias, x)
    return (y, mean, variance), (x, mean, inverse, scale)


def _normalize_backward(epsilon: float, saved: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The paper's derivatives: with x̂ = (x - μ) / σ and means over positions, g_x = γ/σ · (g - mean(g) - x̂·mean(g·x̂)).

    The formulas avoid the array x - μ, which XLA would otherwise keep from the forward pass.
    """
    del epsilon
    x, mean, inverse, scale = saved
    gradient = cotangents[0]
    mean_gradient = _mean(gradient)
    mean_product = (_mean(gradient * x) - mean * mean_gradient) * inverse
    factor = inverse * _as_wide(scale, x)
    slope = factor * inverse * mean_product
    of_x = gradient * factor - x * slope + (mean * slope - factor * mean_gradient)
    positions = x.size // mean.size
    of_scale, of_bias = (positions * jnp.sum(v, range(x.ndim - 1)) for v in (mean_product, mean_gradient))
    return of_x, of_scale, of_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, range(1, x.ndim - 1), keepdims=True)


def _as_wide(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector (channels,) with the number of axes of x."""
    return vector[(None,) * (x.ndim - 1)]


class BatchNorm(nn.BatchNorm):
    """Linen's batch norm over all axes but the last, with `normalize` for batch statistics.

    It supports Linen's options `use_running_average`, `momentum`, `epsilon` and the initialisers, and computes in
    float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises float32 x (examples, ..., channels), and updates the stored statistics if they are mutable."""
        by_batch = not (self.use_running_average or self.is_initializing())
        return _normalize_parts(self, x, 1) if by_batch else super().__call__(x)


@contextlib.contextmanager
def batch_norm_in_groups(count: int) -> Iterator[None]:
    """Within the context, batch norm in training normalises each of `count` equal parts of the batch separately.

    Part k is the k-th contiguous part of the batch. With one part per device, every device normalises its examples
    without communication ("ghost batch norm", arXiv 1705.08741). The stored statistics are updated with the means over
    parts of mean and variance. Layers that use stored statistics do not change.

    Args:
        count: number of parts; it must divide the number of examples. 1 is plain batch norm.
    """
    if count == 1:
        yield
        return

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not isinstance(norm, nn.BatchNorm) or context.method_name != '__call__' or norm.is_initializing():
            return call(*args, **kwargs)
        stored = nn.merge_param('use_running_average', norm.use_running_average, kwargs.get('use_running_average'))
        return call(*args, **kwargs) if stored else _normalize_parts(norm, args[0], count)

    with intercept_methods(intercept, ('batch_norm_in_groups', count)):
        yield


def _normalize_parts(norm: nn.BatchNorm, x: jax.Array, count: int) -> jax.Array:
    """Returns the concatenated outputs of the layer for the parts, and updates its stored statistics."""
    parts = x.reshape(count, x.shape[0] // count, *x.shape[1:]).astype(jnp.float32)
    channels = x.shape[-1:]
    scale: Any = norm.get_variable('params', 'scale') if norm.use_scale else jnp.ones(channels)
    bias: Any = norm.get_variable('params', 'bias') if norm.use_bias else jnp.zeros(channels)
    with without_modules():
        normalized: Any = normalize(parts, scale.astype(jnp.float32), bias.astype(jnp.float32), norm.epsilon)
    y, mean, variance = normalized
    if norm.is_mutable_collection('batch_stats'):
        for name, value in (('mean', mean), ('var', variance)):
            before: Any = norm.get_variable('batch_stats', name)
            seen = jax.lax.stop_gradient(jnp.mean(value.reshape(count, -1), axis=0))
            norm.put_variable('batch_stats', name, norm.momentum * before + (1 - norm.momentum) * seen)
    return y.reshape(x.shape).astype(norm.dtype or x.dtype)
