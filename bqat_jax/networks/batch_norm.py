"""Batch norm that keeps little for its backward pass, and can normalise parts of a batch apart."""

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
    """Returns x normalised by its own mean and variance, and these (Ioffe and Szegedy, arXiv 1502.03167, section 3).

    y = (x - μ) / √(σ² + ε) · γ + β, with sums over the positions of each channel in each part. JAX's own derivative of
    it keeps x - μ beside x, and sums three times over the batch where two sums do; here x is kept alone. Mean and
    variance are for the stored statistics: no gradient goes through them as results. No forward-mode derivative is
    defined.

    Args:
        x: float32 (parts, examples, ..., channels).
        scale: γ, float32 (channels,).
        bias: β, float32 (channels,).
        epsilon: added to the variance.

    Returns:
        y like x; mean and variance, (parts, 1, ..., channels).
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

    They are written such that x - μ appears in no array of its own: if it did XLA would keep the forward pass's.
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
    """(channels,) with as many axes as x."""
    return vector[(None,) * (x.ndim - 1)]


class BatchNorm(nn.BatchNorm):
    """Linen's batch norm over all axes but the last, by `normalize` where it normalises by the batch.

    Of Linen's options it has `use_running_average`, `momentum`, `epsilon` and the initialisers; it computes in float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises float32 x (examples, ..., channels); moves the stored statistics if these are mutable."""
        by_batch = not (self.use_running_average or self.is_initializing())
        return _normalize_parts(self, x, 1) if by_batch else super().__call__(x)


@contextlib.contextmanager
def batch_norm_in_groups(count: int) -> Iterator[None]:
    """Within it, networks that are applied in training normalise each of `count` equal parts of the batch apart.

    Part k has the k-th of `count` runs of neighbouring examples: with as many parts as devices share the batch, each
    normalises its own examples and nothing is sent ("ghost batch norm", arXiv 1705.08741). The stored statistics move
    towards the mean over parts of means and of variances. Layers that normalise by stored statistics stay as they are.

    Args:
        count: divides the number of examples; 1 for batch norm as it is.
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
    """What the layer would return for each part, put together again; moves its stored statistics."""
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
