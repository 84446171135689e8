"""Gradient estimators: backward rules for rounding, by name; `sign_estimators` has those for two levels.

Notation: g is the gradient with respect to the rounded value, x the value in the integer domain (codes are 1 apart),
r = x - floor(x) - 1/2 its distance from the threshold between the two nearest codes. The forward pass rounds to the
nearest integer, ties to even, unless stated otherwise. `docs/estimators.md` compares the estimators.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.quantizers.rounding import Estimator
from bqat_jax.registry import Registry

ESTIMATORS = Registry('gradient estimator')
register_estimator = ESTIMATORS.register

# Number of points in one period at which the sign of a backward rule is checked.
CHECKED_POINTS = 4001


def get_estimator(text: str) -> Estimator:
    """Returns the estimator that a text such as 'identity' or 'ewgs:delta=0.1' describes.

    Raises:
        ValueError: for an unknown name or option, or an invalid value.
    """
    return ESTIMATORS.make(text)


def _from_threshold(value: jax.Array) -> jax.Array:
    """Returns r, in [-1/2, 1/2)."""
    return value - jnp.floor(value) - 0.5


def check(holds: bool, estimator: Estimator, message: str) -> None:
    """Raises a ValueError that names the estimator and its options unless `holds`."""
    if not holds:
        raise ValueError(f'{ESTIMATORS.describe(estimator)}: {message}.')


@register_estimator('identity')
class Identity(Estimator):
    """The straight-through estimator: the derivative of rounding is 1 (Bengio et al., arXiv 1308.3432).

    dx = g
    """

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del value, rounded, context
        return cotangent


@register_estimator('ewgs')
class EWGS(Estimator):
    """Element-wise gradient scaling with a fixed strength (Lee et al., CVPR 2021, arXiv 2104.00903).

    dx = g · (1 + δ · sign(g) · (x - round(x)))

    The paper measures x - round(x) in the normalized domain, where codes range from 0 to 1. There the effect of δ is
    1 / (number of codes - 1) of its effect in the integer domain, which others use (arXiv 2203.11086 with δ = 0.2).

    Attributes:
        delta: δ >= 0; 0 is the identity.
        domain: 'integer' or 'normalized'.
    """

    delta: float = 0.2
    domain: str = 'integer'

    def __post_init__(self):
        check(self.delta >= 0, self, 'delta must not be negative')
        check(self.domain in ('integer', 'normalized'), self, "domain must be 'integer' or 'normalized'")

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        delta = self.delta / (context.upper - context.lower) if self.domain == 'normalized' else self.delta
        return cotangent * (1.0 + delta * jnp.sign(cotangent) * (value - rounded))


@register_estimator('ewgs_trace')
class EWGSTrace(Estimator):
    """Element-wise gradient scaling whose strength follows the loss's curvature (arXiv 2104.00903, section 3.3).

    dx = g · (1 + δ · sign(g) · (x - round(x)) / (number of codes - 1)),   δ = max(0, (Tr(H) / N) / (3 · std(g)))

    H is the Hessian of the loss with respect to the codes in the normalized domain. `bqat_jax.training.strengths`
    measures δ separately for the weights and the inputs of every layer, on the schedule of `quant.trace`. δ is 0 before
    the first measurement, as in the paper.
    """

    needs_strength = True

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        strength = 0.0 if context.strengths is None else context.strengths / (context.upper - context.lower)
        return cotangent * (1.0 + strength * jnp.sign(cotangent) * (value - rounded))


@register_estimator('dsq')
class DSQ(Estimator):
    """Differentiable soft quantization (Gong et al., ICCV 2019, arXiv 1908.05033).

    The gradient is that of floor(x) + (c · tanh(k · r) + 1) / 2, with c = 1 / (1 - α) = 1 / tanh(k / 2) and
    k = ln(2 / α - 1): largest at the thresholds.

    dx = g · (c · k / 2) · sech²(k · r)

    The paper learns α; here it is fixed, as in public implementations that train stably.

    Attributes:
        alpha: 0 < α < 1; the soft function approaches a staircase as α goes to 0 and the identity as α goes to 1.
    """

    alpha: float = 0.2

    def __post_init__(self):
        check(0 < self.alpha < 1, self, 'alpha must lie between 0 and 1')

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del rounded, context
        k, c = math.log(2 / self.alpha - 1), 1 / (1 - self.alpha)
        return cotangent * (0.5 * c * k / jnp.cosh(k * _from_threshold(value)) ** 2)


@register_estimator('soft_round')
class SoftRound(Estimator):
    """Tanh soft rounding (Agustsson and Theis, NeurIPS 2020, arXiv 2006.09952), in the backward pass only.

    The gradient is that of floor(x) + 1/2 + tanh(a · r) / (2 · tanh(a / 2)).

    dx = g · a · sech²(a · r) / (2 · tanh(a / 2))

    The rule is DSQ's with k = a. The sharpness a changes linearly over training, from `sharpness` to
    `final_sharpness`.

    Attributes:
        sharpness: a > 0 at the beginning of training.
        final_sharpness: a at its end.
    """

    sharpness: float = 2.0
    final_sharpness: float = 2.0

    def __post_init__(self):
        check(min(self.sharpness, self.final_sharpness) > 0, self, 'sharpness and final_sharpness must be positive')

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del rounded
        a = jnp.float32(self.sharpness + (self.final_sharpness - self.sharpness) * context.progress)
        return cotangent * (a / (2 * jnp.tanh(a / 2)) / jnp.cosh(a * _from_threshold(value)) ** 2)


@register_estimator('stacked_sigmoid')
class StackedSigmoid(Estimator):
    """A sigmoid between every two codes (one of the discretizers compared in arXiv 2203.11086).

    The gradient is that of floor(x) + (σ(a · r) - σ(-a / 2)) / (σ(a / 2) - σ(-a / 2)).

    dx = g · a · σ(a · r) · σ(-a · r) / (2 · σ(a / 2) - 1)

    Attributes:
        sharpness: a > 0.
    """

    sharpness: float = 4.0

    def __post_init__(self):
        check(self.sharpness > 0, self, 'sharpness must be positive')

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del rounded, context
        a = self.sharpness
        scaled = a * _from_threshold(value)
        return cotangent * (a / math.tanh(a / 4) * jax.nn.sigmoid(scaled) * jax.nn.sigmoid(-scaled))


@register_estimator('rdfs')
class RDFS(Estimator):
    """Rotated damped Fourier surrogate (StableQAT, arXiv 2601.19320).

    The staircase rotated by 45 degrees is a triangle wave; its damped, truncated Fourier series is smooth.

    dx = g · (1 - C) / (1 + C),   C = A · √2 · π · Σ_{m=0}^{M} (-1)^m / (2m + 1) · cos((2m + 1) · π · (x + round(x)))

    The authors' code takes a list of amplitudes and omits the factor (-1)^m / (2m + 1); with one term, as in their
    configurations, the two are equal. The rule applies to the input only: the step keeps LSQ's gradient, round(u) - u,
    as in their code. With `lsq_step` false the rule applies to the step too (ours). The gradient is far below 1 near
    the codes (its mean is 0.30 at A = 0.21), so a larger learning rate may be needed.

    Attributes:
        amplitude: A; 0 is the identity. With one term it must be below 1 / (√2 · π) = 0.225.
        terms: M + 1.
        lsq_step: whether steps, offsets and levels have the gradient of the identity.

    Raises:
        ValueError: if the gradient would be negative or infinite for some input.
    """

    amplitude: float = 0.21
    terms: int = 1
    lsq_step: bool = True

    @property
    def straight_step(self) -> bool:
        """See `Estimator`."""
        return self.lsq_step

    def __post_init__(self):
        check(self.terms >= 1 and self.amplitude >= 0, self, 'terms must be at least 1 and amplitude not negative')
        phase = np.linspace(0, 2 * np.pi, CHECKED_POINTS)
        series = sum((-1) ** m / (2 * m + 1) * np.cos((2 * m + 1) * phase) for m in range(self.terms))
        largest = 1 / (math.sqrt(2) * math.pi * np.abs(series).max())
        check(
            self.amplitude < largest,
            self,
            f'the gradient would be negative for some inputs; with {self.terms} terms use amplitude < {largest:.4f}',
        )

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del context
        phase = math.pi * (value + rounded)
        series = jnp.zeros_like(value)
        for m in range(self.terms):
            series += (-1) ** m / (2 * m + 1) * jnp.cos((2 * m + 1) * phase)
        scaled = self.amplitude * math.sqrt(2) * math.pi * series
        return cotangent * ((1 - scaled) / (1 + scaled))


@register_estimator('mad')
class MAD(Estimator):
    """Magnitude-aware differentiation (Sakr et al., ICML 2022, arXiv 2206.06501).

    dx = g between the bounds; g · |bound| / |x| outside

    Clipped inputs still get a gradient. The rule changes the input's gradient only; a learned scale keeps the
    derivative of the clip (ours; the paper's clip is calibrated). The paper uses the rule for weights and clips the
    gradient of activations.
    """

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del value, rounded, context
        return cotangent

    def backward_clipped(self, cotangent, value, bound, context, *, passes):
        """See `Estimator.backward_clipped`."""
        del context, passes
        # Below a lower bound of zero (an unsigned grid) the gradient is zero.
        return cotangent * jnp.abs(bound) / jnp.maximum(jnp.abs(value), 1e-30)


@register_estimator('psgd')
class PSGD(Estimator):
    """Position-based scaled gradient (Kim et al., NeurIPS 2020, arXiv 2005.11035), for weights.

    dx = g · scale · (|x - round(x)| + epsilon)

    Weights near a code stay there. In the paper the forward pass uses full-precision weights and the network is
    quantized after training: `forward=full_precision`. The authors' code has no epsilon, so a weight exactly on a code
    gets no gradient.

    Attributes:
        scale: λ > 0, in the integer domain.
        epsilon: > 0.
        forward: 'round', or 'full_precision' in training.
    """

    scale: float = 4.0
    epsilon: float = 0.01
    forward: str = 'round'

    weights_only = True

    def __post_init__(self):
        check(self.scale > 0 and self.epsilon > 0, self, 'scale and epsilon must be positive')
        check(self.forward in ('round', 'full_precision'), self, "forward must be 'round' or 'full_precision'")

    @property
    def rounds_in_training(self) -> bool:
        """See `Estimator`."""
        return self.forward == 'round'

    def round(self, value, context):
        """See `Estimator.round`."""
        return jnp.round(value) if self.rounds_in_training or context.key is None else value

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del rounded, context
        return cotangent * (self.scale * (jnp.abs(value - jnp.round(value)) + self.epsilon))


@register_estimator('stochastic')
class Stochastic(Estimator):
    """Stochastic rounding in training: up with probability x - floor(x) (Gupta et al., arXiv 1502.02551).

    Forward floor(x + u), u uniform on [0, 1), in training; rounding in evaluation. dx = g
    """

    def round(self, value, context):
        """See `Estimator.round`."""
        if context.key is None:
            return jnp.round(value)
        return jnp.floor(value + jax.random.uniform(context.key, value.shape))

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del value, rounded, context
        return cotangent


@register_estimator('noise')
class Noise(Estimator):
    """Additive noise in place of rounding in training (UNIQ, arXiv 1804.10969).

    Forward x + u, u uniform on [-1/2, 1/2), in training; rounding in evaluation. dx = g, the exact derivative.
    """

    @property
    def rounds_in_training(self) -> bool:
        """See `Estimator`."""
        return False

    def round(self, value, context):
        """See `Estimator.round`."""
        if context.key is None:
            return jnp.round(value)
        return value + jax.random.uniform(context.key, value.shape, minval=-0.5, maxval=0.5)

    def backward(self, cotangent, value, rounded, context):
        """See `Estimator.backward`."""
        del value, rounded, context
        return cotangent


IDENTITY = Identity()
