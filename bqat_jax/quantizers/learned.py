"""Uniform quantizers with a learned scale: LSQ, LSQ+, PACT and EWGS's range."""

import math

import jax
import jax.numpy as jnp

from bqat_jax.quantizers.base import (
    LARGEST_SHRINKAGE,
    SMALLEST_STEP,
    UniformQuantizer,
    positive_or,
    register_quantizer,
)
from bqat_jax.quantizers.grids import IntegerGrid
from bqat_jax.quantizers.rounding import scale_gradient
from bqat_jax.quantizers.statistics import (
    mean_magnitude,
    optimal_clip,
    range_of_least_error,
    standard_deviation,
)

ZERO = 0.0
HALF = 0.5


@register_quantizer('lsq')
class LSQ(UniformQuantizer):
    """Learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

    With step s > 0 and integer bounds l (lower) and u (upper, the paper's Q_P):

        y = s · round(clip(v / s, l, u))
        dy/dv = 1 where l < v/s < u, else 0
        dy/ds = round(v/s) - v/s where l < v/s < u;  l where v/s <= l;  u where v/s >= u

    The gradient of s is multiplied by 1 / sqrt(N · Q_P). N is the number of elements that share one step: of the weight
    tensor (of one output channel if `channel_axis` is set), or of one example's features if `batch_axis` is set. For
    activations the paper says "the number of features in a layer"; public implementations also count the batch, which
    makes the step's learning rate depend on the batch size. We do not.

    These are the straight-through gradients. Another estimator replaces the derivative of rounding by R'(v/s):
    dy/dv = R' inside, dy/ds = round(v/s) - R' · v/s inside.

    Attributes:
        narrow: omits the lowest code, which makes the grid symmetric: ternary at 2 bits.
    """

    narrow: bool = False

    per_channel = True
    positive = ('step_size',)

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.signed, self.narrow).lower

    def init(self, v):
        """Returns the paper's initial step, 2 · mean|v| / sqrt(Q_P), per tensor or channel.

        An all-zero channel gets the step of the tensor; an all-zero tensor gets the step for mean|v| = 1.
        """
        return {'step_size': mean_magnitude(self, v) * (2.0 / math.sqrt(self.upper))}

    def prepare(self, parameters, v):
        """Scales the step's gradient; the values do not change."""
        factor = 1.0 / math.sqrt(self.count(v.shape) * self.upper)
        return {name: scale_gradient(factor, x) for name, x in parameters.items()}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        return prepared['step_size'], jnp.float32(ZERO)


@register_quantizer('lsq_plus')
class LSQPlus(LSQ):
    """LSQ+ (Bhalgat et al., CVPR 2020 workshops, arXiv 2004.09576): LSQ with a learned offset b for activations.

        y = s · round(clip((x - b) / s, 0, 2^bits - 1)) + b
        dy/ds = round(u) - u inside (u = (x - b) / s), else the bound;  dy/db = 0 inside, 1 outside

    Weights use LSQ with another initial step: max(|μ - 3σ|, |μ + 3σ|) / 2^(bits-1). Activations start with the s and b
    of least squared error. The gradients of s and b have LSQ's scale 1 / sqrt(N · Q_P) (ours; the paper states none).
    Zero is in general not a level; a convolution still pads with exact zeros, because it pads after quantization.

    Activations ignore `signed`: their codes are always 0 .. 2^bits - 1, and the offset shifts the range.
    """

    bits_signed = (1, 2, 3, 4, 5, 6, 7, 8)

    def __post_init__(self):
        super().__post_init__()
        if self.of_weights and self.bits < 2:
            raise ValueError("The quantizer 'lsq_plus' of weights needs at least 2 bits. For 1 bit, use 'binary'.")
        if self.narrow and not self.of_weights:
            raise ValueError("The quantizer 'lsq_plus' of activations has no narrow grid: its offset shifts the grid.")

    @property
    def lower(self) -> int:
        """The smallest code."""
        return super().lower if self.of_weights else 0

    @property
    def upper(self) -> int:
        """The largest code."""
        return IntegerGrid(self.bits, self.of_weights).upper

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero."""
        return self.of_weights

    def init(self, v):
        """See `Quantizer.init`."""
        if self.of_weights:
            x = v.astype(jnp.float32)
            axes = self.shared_axes(v.ndim)
            mean, deviation = jnp.mean(x, axis=axes), 3 * jnp.std(x, axis=axes)
            end = jnp.maximum(jnp.abs(mean - deviation), jnp.abs(mean + deviation))
            return {'step_size': positive_or(end, mean_magnitude(self, v)) / 2 ** (self.bits - 1)}
        low, high = range_of_least_error(v, self.upper + 1)
        return {'step_size': (high - low) / self.upper, 'offset': low}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`; the offset is in steps, so that y is one product."""
        step = prepared['step_size']
        return step, jnp.float32(ZERO) if self.of_weights else prepared['offset'] / step


@register_quantizer('pact')
class PACT(UniformQuantizer):
    """Parameterized clipping activation (Choi et al., arXiv 1805.06085): a learned clip a.

        y = round(clip(x, 0, a) · (2^bits - 1) / a) · a / (2^bits - 1)
        dy/dx = 1 where 0 <= x <= a, else 0;   dy/da = 1 where x >= a, else 0

    The paper adds an L2 penalty on a: `optimizer.quantizers.weight_decay`. Without it a hardly shrinks. Weights and
    signed inputs are clipped to [-a, a], with one code less (ours; the paper quantizes the outputs of ReLUs). The paper
    starts a at a constant, public implementations at 6 or 8; we start at the clip of least squared error, which adapts
    to the data's scale (ours).
    """

    includes_bounds = True
    step_gradient_inside = False
    positive = ('clip_value',)

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.signed, narrow=True).lower

    def init(self, v):
        """See `Quantizer.init`."""
        return {'clip_value': optimal_clip(self, v)}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        return prepared['clip_value'] / self.upper, jnp.float32(ZERO)


@register_quantizer('pact_plus')
class PACTPlus(PACT):
    """PACT whose clip also gets a gradient from inside the range, the default of IBM's and other code.

        dy/da = (round(u) - u) / (2^bits - 1) where 0 < x < a, u = x · (2^bits - 1) / a;  1 where x >= a

    This is LSQ's gradient for the step a / (2^bits - 1).
    """

    step_gradient_inside = True


@register_quantizer('ewgs_range')
class EWGSRange(UniformQuantizer):
    """The quantizer of EWGS (Lee et al., CVPR 2021, arXiv 2104.00903): a learned range [l, u] and output scale.

        x_n = clip((x - l) / (u - l), 0, 1);   x_q = round((2^bits - 1) · x_n) / (2^bits - 1)
        y = c · x_q for unsigned activations, c · 2 · (x_q - 1/2) for weights

    Signed activations use the rule of weights (ours; the paper's follow a ReLU).

    l and u have the gradients that follow from x_n; the paper's estimator is `ewgs` or `ewgs_trace`. In the paper a
    layer has one output scale after the convolution; here its weights and its input have one scale each, and their
    product takes its place (ours: a quantizer sees one tensor, not the layer). Weights start with l, u = ±3σ,
    activations with l = min(x) and u = 3σ / sqrt(1 - 2/π); c starts at mean|x| / mean|y / c| of the tensor.
    """

    bits_signed = (1, 2, 3, 4, 5, 6, 7, 8)
    includes_bounds = True
    positive = ('output_scale',)
    is_idempotent = False  # The output scale differs from the input range.

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return HALF if self.signed else ZERO

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero; unsigned inputs guarantee it only for l >= 0."""
        return False

    def init(self, v):
        """See `Quantizer.init`."""
        x = v.astype(jnp.float32)
        deviation = standard_deviation(self, v)
        if self.signed:
            low, high = -3 * deviation, 3 * deviation
        else:
            low = jnp.min(x)
            high = jnp.maximum(3 * deviation / math.sqrt(1 - 2 / math.pi), low + deviation)
        parameters = {'lower': low, 'upper': high, 'output_scale': jnp.float32(1)}
        size = jnp.mean(jnp.abs(self.fake_quantize(parameters, x)))
        scale = jnp.mean(jnp.abs(x)) / jnp.maximum(size, 1e-6)
        return {**parameters, 'output_scale': positive_or(scale, 1.0)}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        del prepared
        codes = self.upper - self.lower
        return jnp.float32((2 if self.signed else 1) / codes), jnp.float32(self.shift)

    def transform(self, prepared, v):
        """Maps [l, u] to [-1, 1], or [0, 1] for unsigned."""
        x, low, high = v.astype(jnp.float32), prepared['lower'], prepared['upper']
        inside = (x >= low) & (x <= high)
        # Values outside are clipped, so they contribute no gradient to the bounds.
        low, high = (jnp.where(inside, bound, jax.lax.stop_gradient(bound)) for bound in (low, high))
        normalized = (x - low) / (high - low)
        return 2 * normalized - 1 if self.signed else normalized

    def output(self, prepared):
        """Returns the output scale c."""
        return prepared['output_scale']

    def constrain(self, new, old):
        """Keeps the output scale positive and the range at least half as wide as before the update."""
        kept = super().constrain(new, old)
        least = jnp.maximum((old['upper'] - old['lower']) * LARGEST_SHRINKAGE, SMALLEST_STEP)
        missing = jnp.maximum(least - (kept['upper'] - kept['lower']), 0.0)
        return {**kept, 'lower': kept['lower'] - missing / 2, 'upper': kept['upper'] + missing / 2}
