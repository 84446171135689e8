"""Batch norm that normalises parts of a batch apart, as it comes out where each device sees only its own examples."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


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
        return call(*args, **kwargs) if stored else _normalize(norm, args[0], count)

    with nn.intercept_methods(intercept):
        yield


def _normalize(norm: nn.BatchNorm, x: jax.Array, count: int) -> jax.Array:
    """What the layer would return for each part, put together again; moves its stored statistics."""
    parts = x.reshape(count, x.shape[0] // count, *x.shape[1:]).astype(jnp.float32)
    axes = tuple(range(1, x.ndim))
    mean = jnp.mean(parts, axes, keepdims=True)
    variance = jnp.maximum(jnp.mean(parts**2, axes, keepdims=True) - mean**2, 0.0)
    if norm.is_mutable_collection('batch_stats'):
        for name, value in (('mean', mean), ('var', variance)):
            before: Any = norm.get_variable('batch_stats', name)
            seen = jnp.mean(value.reshape(count, -1), axis=0)
            norm.put_variable('batch_stats', name, norm.momentum * before + (1 - norm.momentum) * seen)
    factor: Any = jax.lax.rsqrt(variance + norm.epsilon)
    if norm.use_scale:
        factor = factor * jnp.asarray(norm.get_variable('params', 'scale'), jnp.float32)[(None,) * x.ndim]
    y = (parts - mean) * factor
    if norm.use_bias:
        y = y + jnp.asarray(norm.get_variable('params', 'bias'), jnp.float32)[(None,) * x.ndim]
    return y.reshape(x.shape).astype(norm.dtype or x.dtype)
