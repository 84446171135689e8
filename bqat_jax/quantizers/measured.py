"""Uniform quantizers without a learned scale: computed from the weights in every forward pass, or calibrated once.

Activations cannot use the first kind: an example's output would depend on the rest of its batch.
"""

import abc
import math

import jax
import jax.numpy as jnp

from bqat_jax.quantizers.base import UniformQuantizer, positive_or, register_quantizer
from bqat_jax.quantizers.grids import IntegerGrid
from bqat_jax.quantizers.rounding import scale_gradient
from bqat_jax.quantizers.statistics import (
    maximum_magnitude,
    mean_magnitude,
    optimal_clip,
    root_mean_square,
)

WEIGHTS_ALONE = (
    'it computes its scale from the tensor at every step, so an example would depend on its batch; for activations use '
    'lsq or another quantizer'
)
# BitNet's lower bound of mean|w|.
ABSMEAN_FLOOR = 1e-5
# From SAWB's paper and code: bits to (c1, c2), for 2^bits levels.
SAWB_COEFFICIENTS = {
    2: (3.12, -2.064),
    3: (7.509, -6.892),
    4: (12.68, -12.80),
    5: (17.74, -18.64),
    8: (31.76, -35.04),
}


@register_quantizer('dorefa')
class DoReFa(UniformQuantizer):
    """DoReFa-Net (Zhou et al., arXiv 1606.06160); q(r) = round((2^bits - 1) · r) / (2^bits - 1).

        weights:     y = 2 · q(tanh(w) / (2 · max|tanh(w)|) + 1/2) - 1;  1 bit: sign(w) · mean|w|
        activations: y = q(clip(x, 0, 1))

    The gradient passes straight through q; tanh, its maximum and the clip (bounds included) are differentiated. With 1
    bit the gradient passes straight through sign, and mean|w| gets none. The quantizer has no learned parameters.
    Quantized weights lie in [-1, 1] at any scale of w, so a batch norm has to follow.
    """

    bits_signed = (1, 2, 3, 4, 5, 6, 7, 8)
    not_for_signed_activations = 'activations are clipped to [0, 1], and these can be negative'
    includes_bounds = True
    is_learned = False

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return 0.5 if self.of_weights else 0.0

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.of_weights).lower

    @property
    def upper(self) -> int:
        """The largest code."""
        return IntegerGrid(self.bits, self.of_weights).upper

    @property
    def is_idempotent(self) -> bool:
        """See `Quantizer`."""
        return not self.of_weights

    @property
    def passes_bounds(self) -> bool:
        """See `UniformQuantizer`."""
        return self.of_weights

    def init(self, v):
        """See `Quantizer.init`."""
        del v
        return {}

    def prepare(self, parameters, v):
        """Adds the statistics of the weights."""
        if not self.of_weights:
            return parameters
        if self.bits == 1:
            return {'scale': jax.lax.stop_gradient(mean_magnitude(self, v))}
        largest = jnp.max(jnp.abs(jnp.tanh(v.astype(jnp.float32))))
        return {'largest': positive_or(largest, 1.0)}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        if not self.of_weights:
            return jnp.float32(1 / self.upper), jnp.float32(0)
        step = 2 * prepared['scale'] if self.bits == 1 else jnp.float32(2 / (2**self.bits - 1))
        return step, jnp.float32(self.shift)

    def transform(self, prepared, v):
        """Returns tanh(w) / max|tanh(w)|, or v for activations and 1-bit weights."""
        if not self.of_weights or self.bits == 1:
            return v
        return jnp.tanh(v.astype(jnp.float32)) / prepared['largest']


class _FromWeights(UniformQuantizer):
    """Base of weight quantizers; the step is computed from the weights without a gradient, clipped weights get one."""

    per_channel = True
    not_for_activations = WEIGHTS_ALONE
    passes_bounds = True
    is_learned = False
    is_idempotent = False

    def init(self, v):
        """Returns {}: there are no parameters."""
        del v
        return {}

    @abc.abstractmethod
    def step(self, v: jax.Array) -> jax.Array:
        """Returns the step, () or (channels,)."""

    def prepare(self, parameters, v):
        """Adds the step."""
        del parameters
        return {'step_size': jax.lax.stop_gradient(self.step(v))}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        return prepared['step_size'], jnp.float32(self.shift)


@register_quantizer('sawb')
class SAWB(_FromWeights):
    """Statistics-aware weight binning (Choi et al., arXiv 1807.06964).

        y: the nearest of 2^bits equidistant levels from -a to a,   a = c1 · sqrt(mean(w²)) + c2 · mean|w|

    This is the published rule, which has no level at zero; the authors' code also has a version with one. dy/dw = 1,
    also for clipped weights. Where a is not positive, max|w| replaces it, as in the authors' code. c1 and c2 are fitted
    for 2, 3, 4, 5 and 8 bits.
    """

    bits_signed = tuple(SAWB_COEFFICIENTS)

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return 0.5

    def step(self, v):
        """Returns 2a / (2^bits - 1)."""
        c1, c2 = SAWB_COEFFICIENTS[self.bits]
        clip = c1 * root_mean_square(self, v) + c2 * mean_magnitude(self, v)
        return jnp.where(clip > 0, clip, maximum_magnitude(self, v)) * (2 / (2**self.bits - 1))


@register_quantizer('statsq')
class StatsQ(_FromWeights):
    """StatsQ of OFQ (Liu et al., ICML 2023, arXiv 2302.02210).

        y = a · (round(clip(w / a, -1, 1) · n - 1/2) + 1/2) / n,   a = 2 · mean|w| per output channel,  n = 2^(bits-1)

    There is no level at zero; dy/dw = 1, also for clipped weights. The authors clip at 1 - 1e-6 to keep the largest
    code in range; here the code is clipped.
    """

    bits_signed = (1, 2, 3, 4, 5, 6, 7, 8)
    channel_by_default = True

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return 0.5

    def step(self, v):
        """Returns a / n."""
        return mean_magnitude(self, v) * (2 / 2 ** (self.bits - 1))


@register_quantizer('absmean_ternary')
class AbsmeanTernary(_FromWeights):
    """The ternary weights of BitNet b1.58 (Ma et al., arXiv 2402.17764).

        y = γ · clip(round(w / γ), -1, 1),   γ = max(mean|w|, 1e-5) of the whole tensor;   dy/dw = 1

    Ternary codes need 2 bits, so `bits` must be 2.
    """

    bits_signed = (2,)
    per_channel = False

    @property
    def lower(self) -> int:
        """The smallest code."""
        return -1

    def step(self, v):
        """Returns γ."""
        return jnp.maximum(jnp.mean(jnp.abs(v.astype(jnp.float32))), ABSMEAN_FLOOR)


@register_quantizer('binary')
class Binary(UniformQuantizer):
    """The scaled sign of 1-bit networks (XNOR-Net, Rastegari et al., arXiv 1603.05279).

        weights: y = a · sign(w),  a = mean|w|;   signed activations: y = a · sign(x),  a learned
        dy/dx = 1 where |x| <= a, else 0;   dy/da = sign(x)

    The mask at a is ours: XNOR-Net has |x| <= 1 for the input of its sign, and adds 1/n to the weights' gradient for
    their share in a. sign(0) = 1. The weights' gradient also flows through a = mean|w|, as in ReSTE's code. Unsigned
    activations become 0 or a: a · round(clip(x / a, 0, 1)) (ours: their sign is constant). A learned a starts at
    mean|x| (2 · mean|x| if unsigned) and its gradient has LSQ's scale (ours). The one-bit estimators `reste`,
    `piecewise` and `polynomial` see x in units of a.
    """

    bits_signed = (1,)
    bits_unsigned = (1,)
    per_channel = True
    includes_bounds = True
    positive = ('scale',)

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return 0.5 if self.signed else 0.0

    @property
    def is_idempotent(self) -> bool:
        """See `Quantizer`; rescaling channels changes the mean of the tensor."""
        return not self.of_weights

    def init(self, v):
        """See `Quantizer.init`."""
        return {} if self.of_weights else {'scale': mean_magnitude(self, v) * (1 if self.signed else 2)}

    def prepare(self, parameters, v):
        """Computes a from the weights, or scales the gradient of a learned a."""
        if self.of_weights:
            return {'scale': mean_magnitude(self, v)}
        return {'scale': scale_gradient(1 / math.sqrt(self.count(v.shape)), parameters['scale'])}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`; in units of a, whose gradient flows through `output`."""
        scale = jax.lax.stop_gradient(prepared['scale'])
        return (2 * scale if self.signed else scale), jnp.float32(self.shift)

    def output(self, prepared):
        """Returns exactly 1, with the gradient of a."""
        return prepared['scale'] / jax.lax.stop_gradient(prepared['scale'])


class _Calibrated(UniformQuantizer):
    """Base of quantizers whose step is calibrated once and then fixed."""

    narrow: bool = False

    per_channel = True
    is_learned = False

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.signed, self.narrow).lower

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        return jax.lax.stop_gradient(prepared['step_size']), jnp.float32(0)


@register_quantizer('minmax')
class MinMax(_Calibrated):
    """The fixed range of the calibration data: the smallest step at which nothing is clipped, with zero as a level.

    With several batches, the step is the mean over batches. The gradient of the input is LSQ's.

    Attributes:
        narrow: omits the lowest code, which makes the grid symmetric.
    """

    narrow: bool = False

    def init(self, v):
        """See `Quantizer.init`."""
        x, axes = v.astype(jnp.float32), self.shared_axes(v.ndim)
        step = jnp.max(x, axis=axes) / self.upper
        if self.lower < 0:
            step = jnp.maximum(step, jnp.min(x, axis=axes) / self.lower)
        whole = maximum_magnitude(self, v) / self.upper
        return {'step_size': jnp.where(step > 0, step, whole)}


@register_quantizer('octav')
class Octav(_Calibrated):
    """The fixed clip of least mean squared error on the calibration data (OCTAV, Sakr et al., arXiv 2206.06501).

    `optimal_clip` computes the clip once; the paper computes it in every training step. The gradient of the input is
    LSQ's; the paper's is the estimator `mad`.

    Attributes:
        narrow: omits the lowest code, which makes the grid symmetric.
    """

    narrow: bool = False

    def init(self, v):
        """See `Quantizer.init`."""
        return {'step_size': optimal_clip(self, v) / (-self.lower if self.signed else self.upper)}
