"""Uniform quantizers without a learned scale: read off the weights at every step, or calibrated once.

The scale of the first kind is read off the weights in every forward pass. Activations cannot be quantized so: an
example's output would depend on the rest of its batch.
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
    'it reads its scale off the tensor at every step, so that an example would depend on its batch; quantize '
    'activations by lsq or another quantizer'
)
# BitNet's floor of mean|w|.
ABSMEAN_FLOOR = 1e-5
# Table of SAWB's paper and code: bits to (c1, c2), for 2^bits levels.
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
    bit it passes straight through altogether, and mean|w| gets none. There is nothing to learn. Weights end up in [-1,
    1], whatever their size was: a batch norm has to follow.
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
        """Adds what is read off the weights."""
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
        """tanh(w) / max|tanh(w)|, or the input itself."""
        if not self.of_weights or self.bits == 1:
            return v
        return jnp.tanh(v.astype(jnp.float32)) / prepared['largest']


class _FromWeights(UniformQuantizer):
    """A quantizer of weights whose step is read off them, without a gradient, and whose gradient passes the bounds."""

    per_channel = True
    not_for_activations = WEIGHTS_ALONE
    passes_bounds = True
    is_learned = False
    is_idempotent = False

    def init(self, v):
        """Returns nothing: there are no parameters."""
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

    which is the published rule without a level at zero; the inventors' code has a version with one too. dy/dw = 1,
    through the clip too. Where a would not be positive, max|w| takes its place, as
    in the inventors' code. c1 and c2 were fitted for 2, 3, 4, 5 and 8 bits.
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

    without a level at zero; dy/dw = 1, beyond the clip too. The authors clip at 1 - 1e-6 to keep the uppermost code in
    range; here the code itself is.
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

    Ternary codes are kept in 2 bits, so `bits` must be 2.
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
    their share in a. sign(0) = 1. The weights' gradient flows through a = mean|w| too, as in ReSTE's code. Unsigned
    activations become 0 or a: a · round(clip(x / a, 0, 1)) (ours: the sign of what is never negative says nothing). A
    learned a starts at mean|x| (2 · mean|x| if unsigned) and its gradient has LSQ's scale (ours). The estimators for
    one bit, `reste`, `piecewise` and `polynomial`, see x in units of a.
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
        """See `Quantizer`: the mean of rescaled channels is not that of the whole."""
        return not self.of_weights

    def init(self, v):
        """See `Quantizer.init`."""
        return {} if self.of_weights else {'scale': mean_magnitude(self, v) * (1 if self.signed else 2)}

    def prepare(self, parameters, v):
        """Reads a off the weights, or scales the gradient of the learned one."""
        if self.of_weights:
            return {'scale': mean_magnitude(self, v)}
        return {'scale': scale_gradient(1 / math.sqrt(self.count(v.shape)), parameters['scale'])}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`; in units of a, which gets its gradient by `output`."""
        scale = jax.lax.stop_gradient(prepared['scale'])
        return (2 * scale if self.signed else scale), jnp.float32(self.shift)

    def output(self, prepared):
        """Exactly 1, with the gradient of a."""
        return prepared['scale'] / jax.lax.stop_gradient(prepared['scale'])


class _Calibrated(UniformQuantizer):
    """A quantizer whose step is found from data once, and then fixed."""

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
    """The range of the calibration data, fixed: the least step at which nothing is clipped, with zero as a level.

    Over several batches, the mean of their steps. The gradient of the input is LSQ's.

    Attributes:
        narrow: leaves the lowest code out, so that the grid is symmetric.
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
    """The clip of least mean squared error on the calibration data, fixed (OCTAV, Sakr et al., arXiv 2206.06501).

    The clip is `optimal_clip`; the paper's own training computes it again in every step, and this one does not. The
    gradient of the input is LSQ's; the paper's is the estimator `mad`.

    Attributes:
        narrow: leaves the lowest code out, so that the grid is symmetric.
    """

    narrow: bool = False

    def init(self, v):
        """See `Quantizer.init`."""
        return {'step_size': optimal_clip(self, v) / (-self.lower if self.signed else self.upper)}
