"""Quantizers with non-equidistant levels or thresholds: APoT, nuLSQ, LCQ and N2UQ."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.quantizers.base import (
    LevelQuantizer,
    Quantizer,
    UniformQuantizer,
    positive_or,
    register_quantizer,
)
from bqat_jax.quantizers.grids import IntegerGrid, code_dtype
from bqat_jax.quantizers.rounding import EVALUATION, QuantizeSpec, quantize, scale_gradient
from bqat_jax.quantizers.statistics import (
    mean_magnitude,
    normal_step,
    optimal_clip,
    root_mean_square,
    standard_deviation,
)

# APoT's initial clip of normalized weights.
APOT_WEIGHT_CLIP = 3.0
# Number of intervals of LCQ's compressing function.
LCQ_INTERVALS = 16


def standardize(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation of weights, float32, without a gradient; constants get a deviation of 1."""
    x = jax.lax.stop_gradient(v.astype(jnp.float32))
    # Normalized to at most 1, because squares of large numbers overflow.
    largest = positive_or(jnp.max(jnp.abs(x)), 1.0)
    return jnp.mean(x / largest) * largest, positive_or(jnp.std(x / largest) * largest, 1.0)


def additive_powers_of_two(bits: int) -> np.ndarray:
    """Returns the 2^bits magnitudes of APoT, ascending from 0 to 1 (arXiv 1909.13144, section 3.1).

    Sums of n = bits / 2 terms with 2 bits each: p_i in {0, 2^-i, 2^-(i+n), 2^-(i+2n)}. If bits is odd, one more term
    has a single bit; its power precedes the smallest powers of the others.
    """
    terms, is_odd = divmod(bits, 2)
    powers = [[0.0] for _ in range(terms)]
    exponent = 0
    last = None
    for repeat in range(3):
        if is_odd and repeat == (2 if terms else 0):
            last = [0.0, 2.0**-exponent]
            exponent += 1
        for term in powers:
            term.append(2.0**-exponent)
            exponent += 1
    sums = np.zeros(1)
    for term in powers + ([last] if last else []):
        sums = (sums[:, None] + np.array(term)[None, :]).reshape(-1)
    levels = np.unique(sums)
    return (levels / levels.max()).astype(np.float32)


@register_quantizer('apot')
class APoT(LevelQuantizer):
    """Additive powers of two (Li et al., ICLR 2020, arXiv 1909.13144) with the reparameterized clip α.

        activations: y = α · Π(clip(x / α, 0, 1));   weights: y = σ · α · Π(clip(w~ / α, -1, 1)),  w~ = (w - μ) / σ
        dy/dx = 1 where |x| <= α, else 0;   dy/dα = Π(u) - u inside, u = x / α;  sign(x) outside

    Π projects to the nearest level of `additive_powers_of_two`, with a sign bit for weights and signed activations,
    which are ternary at 2 bits. μ and σ have no gradient, as in the authors' code for CIFAR (their ImageNet code
    differentiates them), and the gradient is clipped at every number of bits. σ is multiplied back (ours), so that the
    layer's output keeps its scale; the paper leaves this to batch norm. α starts at 3 for weights, as in the authors'
    code. For activations it starts at the clip of least squared error (ours; the authors' code starts at 6 or 8).
    """

    positive = ('clip_value',)

    @property
    def is_idempotent(self) -> bool:
        """See `Quantizer`."""
        return not self.of_weights

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero; for weights the mean is a level instead."""
        return not self.of_weights

    @property
    def upper(self) -> int:
        """The largest code."""
        return 2**self.bits - (2 if self.signed else 1)

    def init(self, v):
        """See `Quantizer.init`."""
        return {'clip_value': jnp.float32(APOT_WEIGHT_CLIP) if self.of_weights else optimal_clip(self, v)}

    def prepare(self, parameters, v):
        """Adds mean and standard deviation of weights."""
        if not self.of_weights:
            return parameters
        mean, deviation = standardize(v)
        return {**parameters, 'mean': mean, 'deviation': deviation}

    def center(self, prepared):
        """See `LevelQuantizer.center`."""
        return prepared.get('mean')

    def levels(self, prepared):
        """See `LevelQuantizer.levels`."""
        magnitudes = additive_powers_of_two(self.bits - self.signed)
        units = np.concatenate([-magnitudes[:0:-1], magnitudes]) if self.signed else magnitudes
        scale = prepared['clip_value']
        return jnp.asarray(units) * (scale * prepared['deviation'] if self.of_weights else scale)


@register_quantizer('nulsq')
class NuLSQ(LevelQuantizer):
    """Non-uniform learned step sizes (nuLSQ; Yamamoto et al., ACCV 2024): one step between every two levels.

        levels c_j = s_1 + .. + s_j, thresholds halfway between them
        dy/dx = 1 within the levels, else 0
        dy/ds_j = round(u) - u in bin j, u = (x - c_{j-1}) / s_j;  1 above all levels

    Signed values have separate steps below zero. The steps' gradient is multiplied by 1 / sqrt(N · (2^bits - 1)) for
    activations and 2 / sqrt(N · Q) for weights, with Q the number of steps on the same side of zero:
    Q_P = 2^(bits-1) - 1 above, Q_N = 2^(bits-1) below. N is LSQ's; for activations it is the number of elements of one
    example (ours; the authors' code counts the batch). All steps start at the step of least squared error for a normal
    distribution (half-normal if unsigned) with the data's second moment.
    """

    positive = ('step_sizes', 'negative_step_sizes')

    @property
    def upper(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def init(self, v):
        """See `Quantizer.init`."""
        grid = IntegerGrid(self.bits, self.signed)
        deviation = standard_deviation(self, v) if self.signed else math.sqrt(2) * root_mean_square(self, v)
        step = deviation * normal_step(grid.lower, grid.upper)
        parameters = {'step_sizes': jnp.full(grid.upper, 1.0, jnp.float32) * step}
        if self.signed:
            parameters['negative_step_sizes'] = jnp.full(-grid.lower, 1.0, jnp.float32) * step
        return parameters

    def prepare(self, parameters, v):
        """Scales the steps' gradients; the values do not change."""

        def factor(x):
            return 2 / math.sqrt(count * x.size) if self.of_weights else 1 / math.sqrt(count * self.upper)

        count = self.count(v.shape)
        return {name: scale_gradient(factor(x), x) for name, x in parameters.items()}

    def levels(self, prepared):
        """See `LevelQuantizer.levels`."""
        zero, above = jnp.zeros(1, jnp.float32), jnp.cumsum(prepared['step_sizes'])
        if not self.signed:
            return jnp.concatenate([zero, above])
        return jnp.concatenate([-jnp.cumsum(prepared['negative_step_sizes'])[::-1], zero, above])


@register_quantizer('lcq')
class LCQ(Quantizer):
    """Learnable companding quantization (Yamamoto, CVPR 2021, arXiv 2103.07156).

        y = sign(x) · α · f⁻¹(round(n · f(|x| / α)) / n) where |x| < α, else sign(x) · α
        dy/dx = 1 where |x| < α, else 0;   dy/dα = y / α - x / α inside, sign(x) outside
        dy/dθ by the chain rule through f and f⁻¹

    n = 2^bits - 1, or 2^(bits-1) - 1 with a sign bit. f is piecewise linear on 16 intervals of [0, 1], with slopes
    16 · softmax(θ). The estimator rounds in the compressed domain. For the gradients of x and α, f⁻¹ ∘ round ∘ f is one
    rounding; θ gets gradients through all three. Weights are normalized and scaled back (limited weight normalization):
    y = σ · Q((w - μ) / σ), without a gradient through μ and σ (ours). α starts at the clip of least squared error
    (ours), θ at zero: uniform.
    """

    positive = ('clip_value',)

    @property
    def is_idempotent(self) -> bool:
        """See `Quantizer`."""
        return not self.of_weights

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero; for weights the mean is a level instead."""
        return not self.of_weights

    @property
    def compands(self) -> bool:
        """Whether levels are companded: not for 2-bit weights, which are ternary and uniform as in the paper."""
        return not (self.of_weights and self.bits == 2)

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.signed, narrow=True).lower

    @property
    def spec(self) -> QuantizeSpec:
        """The rounding rule and its bounds."""
        return QuantizeSpec(self.estimator, self.lower, self.upper, includes_bounds=True)

    def init(self, v):
        """See `Quantizer.init`."""
        if self.of_weights:
            mean, deviation = standardize(v)
            v = (v.astype(jnp.float32) - mean) / deviation
        parameters = {'clip_value': optimal_clip(self, v)}
        return {**parameters, 'theta': jnp.zeros(LCQ_INTERVALS, jnp.float32)} if self.compands else parameters

    def prepare(self, parameters, v):
        """Adds mean and standard deviation of weights."""
        if not self.of_weights:
            return parameters
        mean, deviation = standardize(v)
        return {**parameters, 'mean': mean, 'deviation': deviation}

    def fake_quantize(self, parameters, v, context=EVALUATION):
        """See `Quantizer.fake_quantize`."""
        prepared = self.prepare(parameters, v)
        units = self._units(prepared, v)
        position, slopes = self._compress(prepared, jax.lax.stop_gradient(units))
        # θ gets its gradient through f, the rounding and f⁻¹.
        rounded = quantize(self.spec, jnp.float32(1), jnp.float32(0), position, context)
        output = self._expand(slopes, rounded)
        # x and α get theirs through the rounding only. Outside the clip α gets none through it.
        clip = prepared['clip_value']
        units = jnp.where(jnp.abs(units) < 1, units, self._units({**prepared, 'clip_value': _frozen(clip)}, v))
        # |x| = α is outside the clip and x = 0 inside, also for unsigned values.
        beyond = jnp.where(jnp.abs(units) < 1, 1.0, 1.0 + 1e-6)
        straight = _frozen(position * beyond) + (units - _frozen(units))
        through = quantize(self.spec, jnp.float32(1), jnp.float32(0), straight, context)
        output = output + (through - _frozen(through))
        return (output * self._scale(prepared)).astype(v.dtype)

    def encode(self, parameters, v):
        """See `Quantizer.encode`."""
        prepared = self.prepare(parameters, v)
        position, _ = self._compress(prepared, self._units(prepared, v))
        return self.spec.codes(position, EVALUATION).astype(code_dtype(self.lower))

    def clips(self, parameters, v):
        """See `Quantizer.clips`."""
        units = self._units(self.prepare(parameters, v), v)
        return (units > 1) | (units < (-1 if self.signed else 0))

    def decode(self, prepared, codes, dtype=jnp.float32):
        """See `Quantizer.decode`."""
        _, slopes = self._compress(prepared, jnp.zeros(()))
        output = self._expand(slopes, codes.astype(jnp.float32))
        return (output * self._scale(prepared)).astype(dtype)

    def _units(self, prepared, v):
        """Returns x / α."""
        x = v.astype(jnp.float32)
        if self.of_weights:
            x = (x - prepared['mean']) * (1 / prepared['deviation'])
        return x * (1 / prepared['clip_value'])

    def _scale(self, prepared):
        clip = prepared['clip_value']
        return clip * prepared['deviation'] if self.of_weights else clip

    def _compress(self, prepared, units):
        """Returns n · sign · f(|units|), extended beyond 1 with slope 1, and the slopes of f."""
        theta = prepared['theta'] if self.compands else jnp.zeros(LCQ_INTERVALS, jnp.float32)
        slopes = LCQ_INTERVALS * jax.nn.softmax(theta)
        size = jnp.abs(units)
        interval = jnp.clip(jnp.floor(size * LCQ_INTERVALS), 0, LCQ_INTERVALS - 1).astype(jnp.int32)
        inside = slopes[interval] * (size - interval / LCQ_INTERVALS) + _starts(slopes)[interval]
        compressed = jnp.where(size < 1, inside, size)
        return self.upper * jnp.sign(units) * compressed, slopes

    def _expand(self, slopes, codes):
        """Returns sign · f⁻¹(|codes| / n)."""
        # Not jnp.sign and jnp.abs: at 0 the derivative must be the right-hand one.
        sign = jnp.where(codes < 0, -1.0, 1.0)
        size = sign * codes * (1 / self.upper)
        starts = _starts(slopes)
        interval = jnp.searchsorted(starts[1:], size, side='right').astype(jnp.int32)
        expanded = interval / LCQ_INTERVALS + (size - starts[interval]) / slopes[interval]
        # Exactly 1 at the end, with the derivative from the left.
        return sign * (expanded + _frozen(jnp.where(size < 1, 0.0, 1.0 - expanded)))


def _starts(slopes: jax.Array) -> jax.Array:
    """Returns f at the start of every interval."""
    return jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(slopes)[:-1] / LCQ_INTERVALS])


def _frozen(x):
    return jax.lax.stop_gradient(x)


@register_quantizer('n2uq')
class N2UQ(UniformQuantizer):
    """Nonuniform-to-uniform quantization (Liu et al., CVPR 2022, arXiv 2111.14826).

    Activations have learned thresholds and equidistant outputs. With widths a_i > 0, D = 2 / (2^bits - 1) and two
    scales:

        x' = c_in · x;   p(x') piecewise linear from 0 at `start`, rising by 1 over every width a_i
        y = c_out · D · round(p(x')):  thresholds T_1 = start + a_1 / 2, T_(i+1) = T_i + (a_i + a_(i+1)) / 2

    The generalized straight-through estimator is the derivative of this piecewise linear map: D / a_i inside segment i
    and 0 outside. a_i and start get their gradients through it too. A value exactly at `start`, such as a zero after a
    ReLU, is outside, as in the authors' code. Activations must be unsigned, because outputs start at zero.

    Weights have a scale per output channel, computed from them without a gradient:

        y = c · (2/n) · (round(n · (clip(w / c, -1, 1) + 1) / 2) - n/2)
        c = n / 2^(bits-1) · mean|w|,   n = 2^bits - 1

    There is no level at zero; dy/dw = 1 where |w| <= c. The authors' code applies the pass-through to w / c, which
    multiplies the gradient by 1/c and does not clip it; we follow the formula. Initially all widths are D, start is 0
    and the range is the one of least squared error (ours; the authors start with scales of 1).
    """

    bits_signed = (1, 2, 3, 4, 5, 6, 7, 8)
    per_channel = True
    channel_by_default = True
    not_for_signed_activations = 'its outputs start at zero, and these activations can be negative'
    includes_bounds = True
    positive = ('widths', 'input_scale', 'output_scale')

    @property
    def shift(self) -> float:
        """See `UniformQuantizer.shift`."""
        return 0.5 if self.of_weights else 0.0

    @property
    def is_idempotent(self) -> bool:
        """See `Quantizer`; thresholds and levels have separate scales."""
        return False

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero; not guaranteed, because thresholds can move below it."""
        return False

    def init(self, v):
        """See `Quantizer.init`."""
        if self.of_weights:
            return {}
        scale = optimal_clip(self, v) / 2
        return {
            'start': jnp.float32(0),
            'widths': jnp.full(self.upper, 2 / self.upper, jnp.float32),
            'input_scale': 1 / scale,
            'output_scale': scale,
        }

    def prepare(self, parameters, v):
        """Adds the weights' scale."""
        if not self.of_weights:
            return parameters
        factor = (2**self.bits - 1) / 2 ** (self.bits - 1)
        return {'scale': jax.lax.stop_gradient(mean_magnitude(self, v)) * factor}

    def grid(self, prepared):
        """See `UniformQuantizer.grid`."""
        if not self.of_weights:
            return jnp.float32(1), jnp.float32(0)
        return prepared['scale'] * (2 / (2**self.bits - 1)), jnp.float32(self.shift)

    def transform(self, prepared, v):
        """Returns the position among the segments."""
        if self.of_weights:
            return v
        position = self._position(prepared, v)
        inside = _frozen((position > 0) & (position <= self.upper))
        # Values outside are clipped, so they contribute no gradient to the segments.
        outside = jnp.where(position == 0, _frozen(position), self._position(_frozen(prepared), v))
        return jnp.where(inside, position, outside)

    def output(self, prepared):
        """Returns the distance between outputs."""
        return None if self.of_weights else prepared['output_scale'] * (2 / self.upper)

    def _position(self, prepared, v):
        widths = prepared['widths']
        edges = prepared['start'] + jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(widths)])
        x = v.astype(jnp.float32) * prepared['input_scale']
        segment = jnp.searchsorted(_frozen(edges)[1:-1], _frozen(x), side='right').astype(jnp.int32)
        return segment.astype(jnp.float32) + (x - edges[segment]) / widths[segment]
