"""What every quantizer is, and the two kinds there are: on a uniform grid, and on any ascending levels.

A quantizer is a frozen dataclass with pure methods over a dict of parameters:

    init(v) -> parameters                        from data
    fake_quantize(parameters, v, context) -> y   differentiable, in the shape and dtype of v
    encode(parameters, v) -> codes               int8 or uint8
    prepare(parameters, v) -> prepared           parameters and what the quantizer reads off v itself, if it does
    decode(prepared, codes) -> y
    constrain(new, old) -> parameters            after an optimizer step

with `fake_quantize(p, v) == decode(prepare(p, v), encode(p, v))` bit for bit in evaluation. A quantizer that reads
nothing off v takes its parameters for prepared ones.
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

# Scales below this are numbers that float32 cannot divide by safely; it is far below any scale a network uses.
SMALLEST_STEP = 1e-12
# An update may shrink a positive parameter to this part of itself at most.
LARGEST_SHRINKAGE = 0.5

QUANTIZERS = Registry('quantizer', fixed=('bits', 'signed', 'channel_axis', 'batch_axis', 'estimator'))
register_quantizer = QUANTIZERS.register


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """What all quantizers share; a subclass is registered by `register_quantizer`.

    Attributes:
        bits: 1 to 8, of those that the quantizer is defined for.
        signed: whether codes go below zero; unsigned fits inputs that never do, such as those after a ReLU.
        channel_axis: the axis of v along which every index has a scale of its own; None for one scale.
        batch_axis: the axis of v that counts examples; None for weights.
        estimator: the backward rule of rounding.

    Raises:
        ValueError: for a combination that the quantizer is not defined for, with the reason.
    """

    bits: int
    signed: bool = True
    channel_axis: int | None = None
    batch_axis: int | None = None
    estimator: Estimator = IDENTITY

    name: ClassVar[str] = ''
    # What the quantizer is defined for; a subclass says why not where it is not.
    bits_signed: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    bits_unsigned: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)
    per_channel: ClassVar[bool] = False
    # Whether weights have a scale per output channel where the config does not say.
    channel_by_default: ClassVar[bool] = False
    not_for_activations: ClassVar[str] = ''
    not_for_signed_activations: ClassVar[str] = ''
    # Whether y, quantized again, is y: not so where the scale is read off v itself.
    is_idempotent: ClassVar[bool] = True
    # Parameters that must stay positive, and whether an optimizer changes any at all.
    positive: ClassVar[tuple[str, ...]] = ()
    is_learned: ClassVar[bool] = True

    def __post_init__(self):
        check_bits(self.bits)
        allowed = self.bits_signed if self.signed else self.bits_unsigned
        reason = ''
        if self.bits not in allowed:
            sign = 'signed' if self.signed else 'unsigned'
            reason = f'where values are {sign} it is defined for these bits: {", ".join(map(str, allowed))}'
        elif not self.of_weights and self.not_for_activations:
            reason = self.not_for_activations
        elif not self.of_weights and self.signed and self.not_for_signed_activations:
            reason = self.not_for_signed_activations
        elif self.channel_axis is not None and not self.per_channel:
            reason = "it has one scale for the whole tensor; take granularity 'tensor' or 'auto'"
        elif self.channel_axis is not None and self.channel_axis == self.batch_axis:
            reason = f'channel_axis and batch_axis are both {self.batch_axis}: a scale per example is not learned'
        elif self.estimator.weights_only and not self.of_weights:
            reason = f'the estimator {self.estimator.name!r} is a rule for weights, and these are activations'
        elif self.estimator.sign_only and self.upper - self.lower != 1:
            reason = (
                f'the estimator {self.estimator.name!r} approximates the sign function, so it fits two levels (1 bit), '
                f'not {self.upper - self.lower + 1}'
            )
        if reason:
            raise ValueError(f'The quantizer {self.name!r} with bits={self.bits} cannot be used here: {reason}.')

    @property
    def of_weights(self) -> bool:
        """Whether weights are quantized, and not activations."""
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
        """How codes are found."""
        return QuantizeSpec(self.estimator, self.lower, self.upper)

    @abc.abstractmethod
    def init(self, v: jax.Array) -> Parameters:
        """Returns initial parameters from v, a floating-point array that the quantizer is going to see."""

    @abc.abstractmethod
    def fake_quantize(self, parameters: Parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        """Returns v on the grid, in the shape and dtype of v; differentiable in parameters and v."""

    @abc.abstractmethod
    def encode(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """Returns the integer codes of v, int8 or uint8, in the shape of v."""

    @abc.abstractmethod
    def decode(self, prepared: Parameters, codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Returns the values that codes stand for, computed in float32 and given in `dtype`."""

    @abc.abstractmethod
    def clips(self, parameters: Parameters, v: jax.Array) -> jax.Array:
        """Returns where v lies beyond the outermost levels, bool in the shape of v."""

    def prepare(self, parameters: Parameters, v: jax.Array) -> Parameters:
        """Returns the parameters with what is read off v itself; see the module's description."""
        del v
        return parameters

    def constrain(self, new: Parameters, old: Parameters) -> Parameters:
        """Returns `new`, parameters after an optimizer step from `old`, with the positive ones kept positive.

        An update may at most halve them. So a scale can shrink towards zero as far as training wants, and can never
        reach or cross it, whatever the learning rate or the scale of the data. This is our rule: papers have none, or a
        constant, and implementations without one report negative steps. Calibrated parameters stay as they are.
        """
        if not self.is_learned:
            return old
        return {name: keep_positive(x, old[name]) if name in self.positive else x for name, x in new.items()}

    def limits(self, prepared: Parameters, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Returns the smallest and the largest value there is, float32, to broadcast against `ndim` axes."""
        shape = () if self.channel_axis is None else self._per_channel_shape(prepared, ndim)
        ends = (jnp.full(shape, code, code_dtype(self.lower)) for code in (self.lower, self.upper))
        lowest, highest = (self.decode(prepared, codes) for codes in ends)
        return lowest, highest

    def _per_channel_shape(self, prepared: Parameters, ndim: int) -> tuple[int, ...]:
        shape = [1] * ndim
        shape[self.channel_axis or 0] = max(x.size for x in prepared.values())
        return tuple(shape)

    def shared_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of v over which one scale is shared."""
        if self.channel_axis is None:
            return tuple(range(ndim))
        return tuple(axis for axis in range(ndim) if axis != self.channel_axis % ndim)

    def broadcast(self, scale: jax.Array, ndim: int) -> jax.Array:
        """A scale, () or (channels,), in a shape that broadcasts against an array of `ndim` axes."""
        if self.channel_axis is None or scale.ndim == 0:
            return scale
        shape = [1] * ndim
        shape[self.channel_axis] = scale.size
        return scale.reshape(shape)

    def count(self, shape: tuple[int, ...]) -> int:
        """N: the elements of an array of this shape that share one scale, of one example where there are examples."""
        count = math.prod(shape[axis] for axis in self.shared_axes(len(shape)))
        if self.batch_axis is not None:
            count //= shape[self.batch_axis]
        return max(count, 1)


class UniformQuantizer(Quantizer):
    """A quantizer on equidistant levels: y = output · step · (code + shift).

    Subclasses say what step and shift are; some map the input first, or scale the output. Where zero lies between two
    levels it is a tie and goes to the upper one, so that sign(0) = 1.
    """

    passes_bounds: ClassVar[bool] = False
    includes_bounds: ClassVar[bool] = False
    step_gradient_inside: ClassVar[bool] = True

    @property
    def spec(self) -> QuantizeSpec:
        """How codes are found."""
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
        """0, or 1/2 where zero lies between two levels."""
        return 0.0

    @abc.abstractmethod
    def grid(self, prepared: Parameters) -> tuple[jax.Array, jax.Array]:
        """Returns step and shift, each () or (channels,), float32."""

    def transform(self, prepared: Parameters, v: jax.Array) -> jax.Array:
        """Maps the input before it is quantized."""
        del prepared
        return v

    def output(self, prepared: Parameters) -> jax.Array | None:
        """A factor of the output, () or (channels,), float32, or None."""
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
        """v in the integer domain, float32."""
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
    """A quantizer on any ascending levels, one set for the whole tensor; codes number the levels from 0."""

    @property
    def spec(self) -> QuantizeSpec:
        """How codes are found."""
        return QuantizeSpec(self.estimator, self.lower, self.upper, includes_bounds=True)

    @property
    def lower(self) -> int:
        """The smallest code."""
        return 0

    @abc.abstractmethod
    def levels(self, prepared: Parameters) -> jax.Array:
        """Returns the ascending levels, float32 (upper + 1,)."""

    def center(self, prepared: Parameters) -> jax.Array | None:
        """What is taken from v first, () float32, or None."""
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
    """Returns `scale`, but `fallback` where it is too small to divide by, as for data of zeros alone; NaN stays."""
    return jnp.where(scale <= SMALLEST_STEP, fallback, scale)


def describe_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """Returns what a quantizer is as JSON; 'name' and 'estimator' are written as in a config."""
    return {
        'name': QUANTIZERS.describe(quantizer),
        'bits': quantizer.bits,
        'signed': quantizer.signed,
        'granularity': 'tensor' if quantizer.channel_axis is None else 'channel',
        'estimator': ESTIMATORS.describe(quantizer.estimator),
    }
