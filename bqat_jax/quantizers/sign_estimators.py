"""Gradient estimators for two levels: approximations of the sign function."""

import abc
import math

import jax
import jax.numpy as jnp

from bqat_jax.quantizers.estimators import check, register_estimator
from bqat_jax.quantizers.rounding import Estimator


class SignEstimator(Estimator):
    """A rule that approximates the sign function, for two levels.

    With u = -1 at the lower and 1 at the upper code, F'(u) is the derivative of an approximation F of sign(u). As
    2 · (round(x) - lower) - 1 = sign(u), the derivative of rounding is F'(u). It applies outside the codes too.
    """

    sign_only = True

    @abc.abstractmethod
    def derivative(self, u: jax.Array, progress: jax.Array) -> jax.Array:
        """Returns F'(u) at `progress`, the completed fraction of training."""

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del rounded
        return cotangent * self.derivative(2.0 * (value - context.lower) - 1.0, context.progress)

    def backward_clipped(self, cotangent, value, bound, context, *, passes):
        """See `Estimator.backward_clipped`."""
        del bound, passes
        return cotangent * self.derivative(2.0 * (value - context.lower) - 1.0, context.progress)


@register_estimator('reste')
class ReSTE(SignEstimator):
    """Rectified straight-through estimator (Wu et al., ICCV 2023): the sign as a limit of powers.

    F(u) = sign(u) · |u|^(1/o);  F'(u) = (1/o) · |u|^((1-o)/o) for m < |u| <= t,  F(m) / m for |u| <= m,  0 for |u| > t

    o grows with training: o = 1 + (1 - cos(π/2 · progress)) · (o_end - 1). The rule thus moves from the
    straight-through estimator towards the sign.

    Attributes:
        o_end: o at the end of training, >= 1.
        threshold: t, in units of the scale.
        floor: m, in units of the scale.
    """

    o_end: float = 3.0
    threshold: float = 1.5
    floor: float = 0.1

    def __post_init__(self):
        check(self.o_end >= 1, self, 'o_end must be at least 1')
        check(0 < self.floor < self.threshold, self, 'floor must lie between 0 and threshold')

    def derivative(self, u, progress):
        """See `SignEstimator.derivative`."""
        o = 1.0 + (1.0 - jnp.cos(jnp.float32(math.pi / 2 * progress))) * (self.o_end - 1.0)
        size = jnp.abs(u)
        power = jnp.maximum(size, self.floor) ** ((1.0 - o) / o) / o
        slope = jnp.where(size > self.floor, power, self.floor ** (1.0 / o) / self.floor)
        return jnp.where(size <= self.threshold, slope, 0.0)


@register_estimator('piecewise')
class Piecewise(SignEstimator):
    """The piecewise polynomial of Bi-Real Net (Liu et al., ECCV 2018, arXiv 1808.00278).

    F(u) = 2u + u² for -1 <= u < 0, 2u - u² for 0 <= u < 1;  F'(u) = 2 - 2|u| for |u| <= 1, else 0
    """

    def derivative(self, u, progress):
        """See `SignEstimator.derivative`."""
        del progress
        return jnp.maximum(2.0 - 2.0 * jnp.abs(u), 0.0)


@register_estimator('polynomial')
class Polynomial(SignEstimator):
    """Polynomial approximation of the sign, of any degree (ours; degree 1 is `piecewise`).

    F(u) = (1 + 1/p) · (u - sign(u) · |u|^(p+1) / (p+1));  F'(u) = (1 + 1/p) · (1 - |u|^p) for |u| <= 1, else 0

    Attributes:
        degree: p >= 1, the degree of F'; larger degrees are closer to the straight-through estimator.
    """

    degree: int = 2

    def __post_init__(self):
        check(self.degree >= 1, self, 'degree must be at least 1')

    def derivative(self, u, progress):
        """See `SignEstimator.derivative`."""
        del progress
        return (1.0 + 1.0 / self.degree) * jnp.maximum(1.0 - jnp.abs(u) ** self.degree, 0.0)
