"""Gradient accumulation over microbatches: a large batch in the memory of a small one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(gradient: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Returns a function that runs a batch in `count` parts and averages the results.

    Part k has the examples k, k + count, .., so that the examples of each device stay on it. Means over examples equal
    those of the full batch, up to summation order. Other results depend on the parts: batch norm normalises each part,
    and its stored statistics are updated `count` times; quantizers that use statistics of their input or draw do so per
    part; feature matching divides by the norm of the part's features; a task that ignores positions divides by the
    number of counted positions of the part.

    Args:
        gradient: `gradient(params, collections, batch, key)` returns ((loss, (collections, metrics)), gradients), with
            loss and metrics averaged over the batch, a tree of arrays with examples along the first axis.
        count: number of parts; it must divide the number of examples.
    """
    if count == 1:
        return gradient

    def run(params, collections, batch, key):
        def part(x):
            return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

        def add(carry, inputs):
            collections, total = carry
            number, part = inputs
            (loss, (collections, metrics)), gradients = gradient(
                params, collections, part, jax.random.fold_in(key, number)
            )
            return (collections, jax.tree.map(jnp.add, total, (loss, metrics, gradients))), None

        def shapes(params, collections, batch, key):
            (loss, (_, metrics)), gradients = gradient(params, collections, batch, key)
            return loss, metrics, gradients

        parts = jax.tree.map(part, batch)
        like = jax.eval_shape(shapes, params, collections, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        (collections, total), _ = jax.lax.scan(add, (collections, zeros), (jnp.arange(count), parts))
        loss, metrics, gradients = jax.tree.map(lambda x: x / count, total)
        return (loss, (collections, metrics)), gradients

    return run
