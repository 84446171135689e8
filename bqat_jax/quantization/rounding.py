"""Gradient estimators: rounding with a chosen backward rule.

Rounding has a derivative that is zero almost everywhere, so training through it needs a stand-in. An estimator is
that stand-in: its forward pass is exactly round-to-nearest, ties to even; its backward pass is its own rule. A
quantizer rounds in the integer domain, value = x / step, and asks its estimator for the gradient there.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class GradientEstimator:
    """A backward rule for rounding.

    Attributes:
        name: the name it is asked for by, as in `config.quant.weights.estimator`.
        backward: `backward(cotangent, value, rounded) -> gradient with respect to value`; all four have the same
            shape, in the integer domain, in float32. Where the quantizer clips, it masks the result itself.
    """

    name: str
    backward: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _identity_backward(cotangent: jax.Array, value: jax.Array, rounded: jax.Array) -> jax.Array:
    del value, rounded
    return cotangent


# The straight-through estimator: rounding counts as the identity (Bengio et al., arXiv 1308.3432).
IDENTITY = GradientEstimator('identity', _identity_backward)

ESTIMATORS: dict[str, GradientEstimator] = {estimator.name: estimator for estimator in (IDENTITY,)}


def get_estimator(name: str) -> GradientEstimator:
    """Returns the gradient estimator called `name`.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f'There is no gradient estimator {name!r}; there are: {", ".join(sorted(ESTIMATORS))}.')
    return ESTIMATORS[name]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def round_with_estimator(estimator: GradientEstimator, value: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties to even; the gradient is the estimator's.

    Args:
        estimator: the backward rule.
        value: floating-point array of any shape.

    Returns:
        Array of the same shape and dtype.
    """
    del estimator
    return jnp.round(value)


def _round_forward(estimator, value):
    del estimator
    return jnp.round(value), value


def _round_backward(estimator, value, cotangent):
    return (estimator.backward(cotangent, value, jnp.round(value)),)


round_with_estimator.defvjp(_round_forward, _round_backward)
