"""Quantizers: pure functions of arrays behind small frozen dataclasses.

Every quantizer has the same four methods over a dict of parameters:
`init(x) -> parameters`, `fake_quantize(parameters, x) -> y`, `encode(parameters, x) -> integer codes` and
`decode(parameters, codes) -> y`, with `fake_quantize == decode(encode(x))` bit for bit, and `constrain(new, old)`
that an optimizer step ends with.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from bqat_jax.quantization.grids import IntegerGrid
from bqat_jax.quantization.rounding import IDENTITY, GradientEstimator

# A step below this is a number float32 cannot divide by safely; it is far below any scale a network uses.
SMALLEST_STEP = 1e-12


@dataclasses.dataclass(frozen=True)
class LSQ:
    """Learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

    With step s > 0 and integer bounds l (lower) and u (upper, the paper's Q_P):

        y = s · round(clip(v / s, l, u))
        dy/dv = 1 where l < v/s < u, else 0
        dy/ds = round(v/s) - v/s where l < v/s < u;  l where v/s <= l;  u where v/s >= u

    and the gradient of s is multiplied by 1 / sqrt(N · Q_P). N is the number of elements that share one step: of
    the weight tensor (of one output channel of it when `channel_axis` is set), or of one example's features when
    `batch_axis` is set. The paper says "the number of features in a layer" for activations; public implementations
    count the batch too, which makes the step's learning rate depend on the batch size. We do not.

    The gradient above is the straight-through one. Another estimator replaces the derivative of rounding, R'(v/s):
    dy/dv = R' inside, dy/ds = round(v/s) - R' · v/s inside.

    All arithmetic on the step is float32, whatever the dtype of v; y has the dtype of v.

    Attributes:
        bits: 2 to 8.
        signed: whether codes go below zero; unsigned fits inputs that never are, such as those after a ReLU.
        channel_axis: the axis of v along which every index has a step of its own; None for one step.
        batch_axis: the axis of v that counts examples, left out of N; None for weights.
        estimator: the backward rule of rounding.
    """

    bits: int
    signed: bool = True
    channel_axis: int | None = None
    batch_axis: int | None = None
    estimator: GradientEstimator = IDENTITY

    def __post_init__(self):
        _ = self.grid  # refuses bits that no grid has
        if self.channel_axis is not None and self.channel_axis == self.batch_axis:
            raise ValueError(
                f'channel_axis and batch_axis are both {self.batch_axis}: a step per example is not learned.'
            )

    @property
    def grid(self) -> IntegerGrid:
        """The integers that codes are taken from."""
        return IntegerGrid(self.bits, self.signed)

    def init(self, v: jax.Array) -> dict[str, jax.Array]:
        """Returns the paper's initial step, 2 · mean|v| / sqrt(Q_P), for each tensor or channel.

        Args:
            v: floating-point array that the quantizer is going to see.

        Returns:
            `{'step_size': float32}`, shape () or (channels,). Where v holds nothing but zeros the data say nothing
            about the scale: such a channel gets the step of the whole tensor, and such a tensor the step 1.
        """
        magnitude = jnp.abs(v.astype(jnp.float32))
        scale = 2.0 / math.sqrt(self.grid.upper)
        whole = jnp.mean(magnitude) * scale
        whole = jnp.where(whole > SMALLEST_STEP, whole, 1.0)
        if self.channel_axis is None:
            return {'step_size': whole}
        channel = jnp.mean(magnitude, axis=self._shared_axes(v.ndim)) * scale
        return {'step_size': jnp.where(channel > SMALLEST_STEP, channel, whole)}

    def fake_quantize(self, parameters: dict[str, jax.Array], v: jax.Array) -> jax.Array:
        """Returns v on the grid, in the shape and dtype of v; differentiable in both arguments by the rules above."""
        return _lsq(self, parameters['step_size'], v)

    def encode(self, parameters: dict[str, jax.Array], v: jax.Array) -> jax.Array:
        """Returns the integer codes of v, int8 or uint8, in the shape of v."""
        return _lsq_codes(self, self._broadcast(parameters['step_size'], v.ndim), v).astype(self.grid.code_dtype)

    def decode(self, parameters: dict[str, jax.Array], codes: jax.Array, dtype=jnp.float32) -> jax.Array:
        """Returns the values that the codes stand for, computed in float32 and given in `dtype`."""
        step = self._broadcast(parameters['step_size'], codes.ndim)
        return (codes.astype(jnp.float32) * step).astype(dtype)

    def constrain(self, new: dict[str, jax.Array], old: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns `new`, parameters after an optimizer step, with the step size kept positive.

        An update may at most halve a step. So a step can shrink towards zero as far as training wants, and can never
        reach or cross it, whatever the learning rate or the scale of the data. This is our rule: the paper has none,
        and implementations without one report negative steps.
        """
        floor = jnp.maximum(old['step_size'] * 0.5, SMALLEST_STEP)
        return {'step_size': jnp.maximum(new['step_size'], floor)}

    def _shared_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of v over which one step is shared."""
        if self.channel_axis is None:
            return tuple(range(ndim))
        return tuple(axis for axis in range(ndim) if axis != self.channel_axis % ndim)

    def _broadcast(self, step: jax.Array, ndim: int) -> jax.Array:
        """The step in a shape that broadcasts against an array of `ndim` axes."""
        if self.channel_axis is None:
            return step
        shape = [1] * ndim
        shape[self.channel_axis] = step.size
        return step.reshape(shape)

    def _gradient_scale(self, shape: tuple[int, ...]) -> float:
        """1 / sqrt(N · Q_P) for an array of this shape."""
        count = math.prod(shape[axis] for axis in self._shared_axes(len(shape)))
        if self.batch_axis is not None:
            count //= shape[self.batch_axis]
        return 1.0 / math.sqrt(max(count, 1) * self.grid.upper)


def _in_steps(v: jax.Array, step: jax.Array) -> jax.Array:
    """v / step in float32.

    As a product with the reciprocal, which XLA makes of such a division in some programs and not in others: written
    out, a value next to a threshold gets the same code in all of them.
    """
    return v.astype(jnp.float32) * (1.0 / step)


def _lsq_codes(quantizer: LSQ, step: jax.Array, v: jax.Array) -> jax.Array:
    """round(clip(v / step)) in float32. Rounding first is the same: the bounds are integers."""
    return jnp.clip(jnp.round(_in_steps(v, step)), quantizer.grid.lower, quantizer.grid.upper)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lsq(quantizer: LSQ, step_size: jax.Array, v: jax.Array) -> jax.Array:
    step = quantizer._broadcast(step_size, v.ndim)
    return (_lsq_codes(quantizer, step, v) * step).astype(v.dtype)


def _lsq_forward(quantizer, step_size, v):
    # Only what the layer holds anyway is kept: the backward pass computes codes and masks again, which costs less
    # than storing them.
    return _lsq(quantizer, step_size, v), (step_size, v)


def _lsq_backward(quantizer, residuals, cotangent):
    step_size, v = residuals
    grid = quantizer.grid
    cotangent32 = cotangent.astype(jnp.float32)
    value = _in_steps(v, quantizer._broadcast(step_size, v.ndim))
    # Explicit masks: the derivative of jnp.clip is 0.5 at an exact bound, and activations after a ReLU sit there.
    inside = (value > grid.lower) & (value < grid.upper)
    rounded = jnp.round(value)
    value_cotangent = quantizer.estimator.backward(cotangent32, value, rounded)
    v_gradient = jnp.where(inside, value_cotangent, 0.0).astype(v.dtype)
    bound = jnp.where(value <= grid.lower, float(grid.lower), float(grid.upper))
    if quantizer.estimator is IDENTITY:
        # The difference first, as in the paper: subtracting two rounded products would lose digits.
        per_element = cotangent32 * jnp.where(inside, rounded - value, bound)
    else:
        per_element = jnp.where(inside, cotangent32 * rounded - value_cotangent * value, cotangent32 * bound)
    step_gradient = jnp.sum(per_element, axis=quantizer._shared_axes(v.ndim))
    return step_gradient * quantizer._gradient_scale(v.shape), v_gradient


_lsq.defvjp(_lsq_forward, _lsq_backward)

QUANTIZERS = {'lsq': LSQ}


def get_quantizer(name: str):
    """Returns the quantizer class called `name`.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"There is no quantizer {name!r}; there are: {', '.join(sorted(QUANTIZERS))}, and 'none'.")
    return QUANTIZERS[name]
