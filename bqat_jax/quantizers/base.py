"""Base classes of quantizers: any quantizer, uniform grids, and arbitrary ascending levels.

A quantizer is a frozen dataclass with pure methods over a dict of parameters:

    init(v) -> parameters                        from data
    fake_quantize(parameters, v, context) -> y   differentiable, in the shape and dtype of v
    encode(parameters, v) -> codes               int8 or uint8
    prepare(parameters, v) -> prepared           parameters, plus statistics that the quantizer takes from v
    decode(prepared, codes) -> y
    constrain(new, old) -> parameters            after an optimizer step

with `fake_quantize(p, v) == decode(prepare(p, v), encode(p, v))` bit for bit in evaluation. A quantizer that takes no
statistics from v accepts plain parameters where prepared ones are expected.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from bqat_jax.quantizers.estimators import ESTIMATORS, IDENTITY
from bqat_jax.quantizers.grids import IntegerGrid, check_bits, code_dtype
from bqat_jax.quantizers.rounding import (
    EVALUATION,
    Context,
    Estimator,
    QuantizeSpec,
    in_steps,
    nearest_levels,
    quantize,
    quantize_to_levels,
)
from bqat_jax.registry import Registry

Parameters: TypeAlias = dict[str, jax.Array]

# Division by a smaller float32 scale is not safe; the scales of networks are far larger.
SMALLEST_STEP = 1e-12
# An update multiplies a positive parameter by at least this factor.
LARGEST_SHRINKAGE = 0.5

QUANTIZERS = Registry('quantizer', fixed=('bits', 'signed', 'channel_axis', 'batch_axis', 'estimator'))
register_quantizer = QUANTIZERS.register


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """Base class of quantizers; `register_quantizer` registers a subclass.

    Attributes:
        bits: 1 to 8; a quantizer may support only some of these.
        signed: whether codes can be negative; unsigned fits nonnegative inputs, such as those after a ReLU.
        channel_axis: the axis of v with one scale per index; None for one scale per tensor.
        batch_axis: the axis of v that indexes examples; None for weights.
        estimator: the backward rule of rounding.

    Raises:
        ValueError: if the quantizer does not support the combination; the message states the reason.
    """

    bits: int
    signed: bool = True
    channel_axis: int | None = None
    batch_axis: int | None = None
    estimator: Estimator = IDENTITY

    name: ClassVar[str] = ''
    # Supported bits and tensors. A `not_for_...` text is the reason why a kind of tensor is not supported.
    bits_signed: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    bits_unsigned: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)
    per_channel: ClassVar[bool] = False
    # Whether weights have a scale per output channel when the config leaves the granularity open.
    channel_by_default: ClassVar[bool] = False
    not_for_activations: ClassVar[str] = ''
    not_for_signed_activations: ClassVar[str] = ''
    # Whether quantizing y returns y. It does not if the scale is computed from v.
    is_idempotent: ClassVar[bool] = True
    # Names of parameters that must stay positive, and whether an optimizer updates the parameters.
    positive: ClassVar[tuple[str, ...]] = ()
    is_learned: ClassVar[bool] = True

    def __post_init__(self):
        check_bits(self.bits)
        allowed = self.bits_signed if self.signed else self.bits_unsigned
        reason = ''
        if self.bits not in allowed:
            sign = 'signed' if self.signed else 'unsigned'
            reason = f'for {sign} values, bits must be one of {", ".join(map(str, allowed))}'
        elif not self.of_weights and self.not_for_activations:
            reason = self.not_for_activations
        elif not self.of_weights and self.signed and self.not_for_signed_activations:
            reason = self.not_for_signed_activations
        elif self.channel_axis is not None and not self.per_channel:
            reason = "it has one scale per tensor; use granularity 'tensor' or 'auto'"
        elif self.channel_axis is not None and self.channel_axis == self.batch_axis:
            reason = f'channel_axis and batch_axis are both {self.batch_axis}; a scale per example cannot be learned'
        elif self.estimator.weights_only and not self.of_weights:
            reason = f'the estimator {self.estimator.name!r} is for weights only, and these are activations'
        elif self.estimator.sign_only and self.upper - self.lower != 1:
            reason = (
                f'the estimator {self.estimator.name!r} approximates the sign function, so it fits two levels (1 bit), '
                f'not {self.upper - self.lower + 1}'
            )
        if reason:
            raise ValueError(f'The quantizer {self.name!r} with bits={self.bits} cannot be used here: {reason}.')

    @property
    def of_weights(self) -> bool:
        """Whether the quantizer is for weights; otherwise it is for activations."""
        return self.batch_axis is None

    @property
    def lower(self) -> int:
        """The smallest code."""
        return IntegerGrid(self.bits, self.signed).lower

    @property
    def upper(self) -> int:
        """The largest code."""
        return IntegerGrid(self.bits, self.signed).upper

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero."""
        return True

    @property
    def spec(self) -> QuantizeSpec:
        """The rounding rule and its bounds."""
        return QuantizeSpec(self.estimator, self.lower, self.upper)

    @abc.abstractmethod
    def init(self, v: jax.Array) -> Parameters:
        """Returns initial parameters from v, a floating-point array like those to be quantized."""

    @abc.abstractmethod
    def fake_quantize(self, parameters: Parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        """Returns v on the grid, in the shape and dtype of v; differentiable in parameters and v."""

    @abc.abstractmethod
    def encode(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """Returns the integer codes of v, int8 or uint8, in the shape of v."""

    @abc.abstractmethod
    def decode(self, prepared: Parameters, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Returns the values of the codes, computed in float32 and cast to `dtype`."""

    @abc.abstractmethod
    def clips(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """Returns a bool mask in the shape of v: True outside the range of the levels."""

    def prepare(self, parameters: Parameters, v: jax.Array) -> Parameters:
        """Returns the parameters plus the statistics that the quantizer takes from v."""
        del v
        return parameters

    def constrain(self, new: Parameters, old: Parameters) -> Parameters:
        """Returns `new`, the parameters after an optimizer step from `old`, with positive parameters kept positive.

        An update at most halves a positive parameter. A scale can therefore approach zero but never reach it, at any
        learning rate and scale of the data. The rule is ours: papers have none, or a constant, and implementations
        without one report negative steps. Calibrated parameters do not change.
        """
        if not self.is_learned:
            return old
        return {name: keep_positive(x, old[name]) if name in self.positive else x for name, x in new.items()}

    def limits(self, prepared: Parameters, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Returns the smallest and the largest level, float32, in a shape that broadcasts against `ndim` axes."""
        shape = () if self.channel_axis is None else self._per_channel_shape(prepared, ndim)
        ends = (jnp.full(shape, code, code_dtype(self.lower)) for code in (self.lower, self.upper))
        lowest, highest = (self.decode(prepared, codes) for codes in ends)
        return lowest, highest

    def _per_channel_shape(self, prepared: Parameters, ndim: int) -> tuple[int, ...]:
        shape = [1] * ndim
        shape[self.channel_axis or 0] = max(x.size for x in prepared.values())
        return tuple(shape)

    def shared_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of v that share one scale."""
        if self.channel_axis is None:
            return tuple(range(ndim))
        return tuple(axis for axis in range(ndim) if axis != self.channel_axis % ndim)

    def broadcast(self, scale: jax.Array, ndim: int) -> jax.Array:
        """Returns a scale, () or (channels,), in a shape that broadcasts against `ndim` axes."""
        if self.channel_axis is None or scale.ndim == 0:
            return scale
        shape = [1] * ndim
        shape[self.channel_axis] = scale.size
        return scale.reshape(shape)

    def count(self, shape: tuple[int, ...]) -> int:
        """Returns N, the number of elements that share one scale; for activations, of one example."""
        count = math.prod(shape[axis] for axis in self.shared_axes(len(shape)))
        if self.batch_axis is not None:
            count //= shape[self.batch_axis]
        return max(count, 1)


class UniformQuantizer(Quantizer):
    """A quantizer on equidistant levels: y = output · step · (code + shift).

    Subclasses define step and shift; some also map the input or scale the output. A zero halfway between two levels
    goes to the upper one, so that sign(0) = 1.
    """

    passes_bounds: ClassVar[bool] = False
    includes_bounds: ClassVar[bool] = False
    step_gradient_inside: ClassVar[bool] = True

    @property
    def spec(self) -> QuantizeSpec:
        """The rounding rule and its bounds."""
        return QuantizeSpec(
            self.estimator,
            self.lower,
            self.upper,
            self.passes_bounds,
            self.includes_bounds,
            self.step_gradient_inside,
        )

    @property
    def has_zero(self) -> bool:
        """Whether zero is quantized to zero."""
        return self.shift == 0

    @property
    def shift(self) -> float:
        """0, or 1/2 if zero lies halfway between two levels."""
        return 0.0

    @abc.abstractmethod
    def grid(self, prepared: Parameters) -> tuple[jax.Array, jax.Array]:
        """Returns step and shift, each () or (channels,), float32."""

    def transform(self, prepared: Parameters, v: jax.Array) -> jax.Array:
        """Returns the input mapped before quantization; by default v."""
        del prepared
        return v

    def output(self, prepared: Parameters) -> jax.Array | None:
        """Returns a factor of the output, float32 () or (channels,), or None for 1."""
        del prepared
        return None

    def fake_quantize(self, parameters: Parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        """See `Quantizer.fake_quantize`."""
        prepared = self.prepare(parameters, v)
        step, shift = (self.broadcast(x, v.ndim) for x in self.grid(prepared))
        mapped, factor = self.transform(prepared, v), self.output(prepared)
        if factor is not None:
            mapped = mapped.astype(jnp.float32)
        y: Any = quantize(self.spec, step, shift, mapped, context)
        return (y if factor is None else y * self.broadcast(factor, v.ndim)).astype(v.dtype)

    def encode(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """See `Quantizer.encode`."""
        return self.spec.codes(self._value(parameters, v), EVALUATION).astype(code_dtype(self.lower))

    def clips(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """See `Quantizer.clips`."""
        value = self._value(parameters, v)
        return (value < self.lower) | (value > self.upper)

    def _value(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """Returns v in the integer domain, float32."""
        prepared = self.prepare(parameters, v)
        step, shift = (self.broadcast(x, v.ndim) for x in self.grid(prepared))
        return in_steps(self.transform(prepared, v), step) - shift

    def decode(self, prepared: Parameters, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """See `Quantizer.decode`."""
        step, shift = (self.broadcast(x, codes.ndim) for x in self.grid(prepared))
        y = (codes.astype(jnp.float32) + shift) * step
        factor = self.output(prepared)
        return (y if factor is None else y * self.broadcast(factor, codes.ndim)).astype(dtype)


class LevelQuantizer(Quantizer):
    """A quantizer on arbitrary ascending levels, one set per tensor; codes are level indices from 0."""

    @property
    def spec(self) -> QuantizeSpec:
        """The rounding rule and its bounds."""
        return QuantizeSpec(self.estimator, self.lower, self.upper, includes_bounds=True)

    @property
    def lower(self) -> int:
        """The smallest code."""
        return 0

    @abc.abstractmethod
    def levels(self, prepared: Parameters) -> jax.Array:
        """Returns the ascending levels, float32 (upper + 1,)."""

    def center(self, prepared: Parameters) -> jax.Array | None:
        """Returns the value to subtract from v, float32 (), or None for 0."""
        del prepared
        return None

    def fake_quantize(self, parameters: Parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        """See `Quantizer.fake_quantize`."""
        prepared = self.prepare(parameters, v)
        y: Any = quantize_to_levels(self.spec, self.levels(prepared), self._centered(prepared, v), context)
        return y.astype(v.dtype)

    def encode(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """See `Quantizer.encode`."""
        prepared = self.prepare(parameters, v)
        codes = nearest_levels(self.spec, self.levels(prepared), self._centered(prepared, v))
        return codes.astype(jnp.uint8)

    def clips(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """See `Quantizer.clips`."""
        prepared = self.prepare(parameters, v)
        levels, x = self.levels(prepared), self._centered(prepared, v).astype(jnp.float32)
        return (x < levels[0]) | (x > levels[-1])

    def decode(self, prepared: Parameters, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """See `Quantizer.decode`."""
        return self.levels(prepared)[codes.astype(jnp.int32)].astype(dtype)

    def _centered(self, prepared: Parameters, v: jax.Array) -> jax.Array:
        center = self.center(prepared)
        return v if center is None else v.astype(jnp.float32) - center


def keep_positive(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new`, but at least half of `old` and at least the smallest step."""
    return jnp.maximum(new, jnp.maximum(old * LARGEST_SHRINKAGE, SMALLEST_STEP))


def positive_or(scale: jax.Array, fallback: jax.Array | float) -> jax.Array:
    """Returns `scale`, or `fallback` where it is too small to divide by, as for all-zero data; NaN stays NaN."""
    return jnp.where(scale <= SMALLEST_STEP, fallback, scale)


def describe_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """Returns a JSON description of a quantizer; 'name' and 'estimator' use the config's notation."""
    return {
        'name': QUANTIZERS.describe(quantizer),
        'bits': quantizer.bits,
        'signed': quantizer.signed,
        'granularity': 'tensor' if quantizer.channel_axis is None else 'channel',
        'estimator': ESTIMATORS.describe(quantizer.estimator),
    }
