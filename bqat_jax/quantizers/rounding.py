"""Rounding with a chosen backward rule: the estimator interface, and the two functions that use an estimator.

The derivative of rounding is zero almost everywhere; an estimator replaces it in training. A quantizer maps its input
to the integer domain, where neighbouring codes are 1 apart. The estimator rounds there and defines the gradient.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.errors import UserError


class Context(NamedTuple):
    """Training progress, randomness and measurements that rounding depends on; a pytree.

    Attributes:
        progress: the completed fraction of training, 0 to 1, for estimators with a schedule.
        key: random key in training; None in evaluation, where every estimator rounds.
        strengths: measured strengths for estimators with `needs_strength`: a scalar for one quantizer, {layer path:
            {role: scalar}} for a network.
        trackers: {layer path: tracker} of weights that may be frozen, for a network; see `oscillations`.
        lower: the smallest code; set by the quantizer.
        upper: the largest code; set by the quantizer.
    """

    progress: Any = 1.0
    key: Any = None
    strengths: Any = None
    trackers: Any = None
    lower: int = 0
    upper: int = 0


EVALUATION = Context()


class Estimator(abc.ABC):
    """A backward rule for rounding; `register_estimator` registers a subclass and makes it a frozen dataclass.

    All arrays are float32, in the integer domain and of one shape.

    Attributes:
        name: set by `register_estimator`.
        needs_strength: whether the rule reads `Context.strengths`.
        sign_only: whether the rule approximates the sign function and thus needs two levels.
        weights_only: whether the rule is for weights only.
    """

    name: ClassVar[str] = ''
    needs_strength: ClassVar[bool] = False
    sign_only: ClassVar[bool] = False
    weights_only: ClassVar[bool] = False

    @property
    def rounds_in_training(self) -> bool:
        """Whether codes are integers in training too; in evaluation they always are."""
        return True

    @property
    def straight_step(self) -> bool:
        """Whether steps, offsets and levels have the identity's gradient: for a step, round(u) - u."""
        return False

    def round(self, value: jax.Array, context: Context) -> jax.Array:
        """Returns `value` rounded to the nearest integer, ties to even."""
        del context
        return jnp.round(value)

    @abc.abstractmethod
    def backward(self, cotangent: jax.Array, value: jax.Array, rounded: jax.Array, context: Context) -> jax.Array:
        """Returns the gradient with respect to `value` where it lies between the smallest and the largest code.

        Args:
            cotangent: gradient with respect to `rounded`.
            value: the input of `round`.
            rounded: the output of `round`.
            context: context with the codes' bounds.
        """

    def backward_clipped(
        self, cotangent: jax.Array, value: jax.Array, bound: jax.Array, context: Context, *, passes: bool
    ) -> jax.Array:
        """Returns the gradient with respect to `value` where it lies outside the bounds.

        Args:
            cotangent: gradient with respect to the clipped value.
            value: the value before clipping.
            bound: the bound to which the value was clipped.
            context: context with the codes' bounds.
            passes: whether the quantizer passes gradients of clipped values.
        """
        del value, bound, context
        return cotangent if passes else jnp.zeros_like(cotangent)


@dataclasses.dataclass(frozen=True)
class QuantizeSpec:
    """The rounding rule, its bounds and the gradient at them.

    Attributes:
        estimator: rounds and defines the gradient between the bounds.
        lower: the smallest code.
        upper: the largest code.
        passes_bounds: whether clipped inputs get a gradient.
        includes_bounds: whether an input exactly at a bound is inside for its own gradient and for that of levels; for
            a step's gradient it never is.
        step_gradient_inside: whether inputs between the bounds contribute to the step's gradient.
    """

    estimator: Estimator
    lower: int
    upper: int
    passes_bounds: bool = False
    includes_bounds: bool = False
    step_gradient_inside: bool = True

    def codes(self, value: jax.Array, context: Context) -> jax.Array:
        """Returns the codes of values in the integer domain, in float32."""
        # Rounding and clipping commute, because the bounds are integers.
        rounded = self._check('round', self.estimator.round(value, self._where(context)), value)
        return jnp.clip(rounded, self.lower, self.upper)

    def backward(self, cotangent: jax.Array, value: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """Returns (inside, within, rounded, gradient between the bounds, bound, gradient with respect to value).

        The mask `inside` excludes the exact bounds; `within` includes them if `includes_bounds`. The masks are explicit
        because the derivative of jnp.clip is 0.5 at an exact bound, where activations after a ReLU lie.
        """
        where = self._where(context)
        inside = (value > self.lower) & (value < self.upper)
        # The rule only sees values between the bounds: far outside, it may not be finite.
        between = jnp.clip(value, self.lower, self.upper)
        rounded = self._check('round', self.estimator.round(between, where), value)
        gradient = self.estimator.backward(cotangent, between, rounded, where)
        self._check('backward', gradient, value)
        bound = jnp.where(value <= self.lower, float(self.lower), float(self.upper))
        within = (value >= self.lower) & (value <= self.upper) if self.includes_bounds else inside
        clipped = self.estimator.backward_clipped(cotangent, value, bound, where, passes=self.passes_bounds)
        return inside, within, rounded, gradient, bound, jnp.where(within, gradient, clipped)

    def _check(self, method: str, returned: Any, value: Any) -> jax.Array:
        """Returns `returned` if its shape is that of `value`; another shape would be broadcast silently."""
        shape = getattr(returned, 'shape', None)
        if shape != value.shape:
            actual = f'a {type(returned).__name__}' if shape is None else f'the shape {shape}'
            raise UserError(
                f'{method} of the estimator {self.estimator.name!r} returned {actual} for an array of shape '
                f'{value.shape}: it must return an array of that shape.'
            )
        return returned

    def _where(self, context: Context) -> Context:
        return context._replace(lower=self.lower, upper=self.upper)


def in_steps(v: jax.Array, step: jax.Array) -> jax.Array:
    """Returns v · (1 / step) in float32.

    XLA rewrites a division to this product in some programs only. With an explicit product, a value next to a threshold
    gets one code in all programs.
    """
    return v.astype(jnp.float32) * (1.0 / step)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantize(spec: QuantizeSpec, step: jax.Array, shift: jax.Array, v: jax.Array, context: Context) -> jax.Array:
    """Quantizes to a uniform grid: y = step · (code + shift), code = clip(round(v / step - shift), lower, upper).

    Gradients, with u = v / step and R' the estimator's derivative of rounding:

        dy/dv     = R' between the bounds, else 0 (or as `spec` and the estimator say)
        dy/dstep  = code + shift - R' · u between the bounds, else bound + shift
        dy/dshift = step · (1 - R') between the bounds, else step

    For step and shift, R' is 1 if the estimator has a `straight_step`.

    Args:
        spec: estimator and bounds.
        step: positive, float32, () or a shape that broadcasts against v.
        shift: float32, () or the shape of step.
        v: floating-point array.
        context: progress, random key and strength.

    Returns:
        y in the shape and dtype of v; the arithmetic is float32.
    """
    codes = spec.codes(in_steps(v, step) - shift, context)
    return ((codes + shift) * step).astype(v.dtype)


def _quantize_forward(spec, step, shift, v, context):
    # The backward pass recomputes codes and masks, which costs less than storing them.
    return quantize(spec, step, shift, v, context), (step, shift, v, context)


def _quantize_backward(spec, residuals, cotangent):
    step, shift, v, context = residuals
    cotangent = cotangent.astype(jnp.float32)
    units = in_steps(v, step)
    value = units - shift
    inside, _, rounded, gradient, bound, v_gradient = spec.backward(cotangent, value, context)
    gradient = cotangent if spec.estimator.straight_step else gradient
    if spec.step_gradient_inside:
        # The second term is exactly zero if the rule is the identity; the difference of cotangent · (code + shift) and
        # gradient · u would lose digits.
        within = cotangent * (rounded - value) + (cotangent - gradient) * units
    else:
        within = jnp.zeros_like(cotangent)
    step_gradient = jnp.where(inside, within, cotangent * (bound + shift))
    shift_gradient = step * jnp.where(inside, cotangent - gradient, cotangent)
    return (
        sum_to_shape(step_gradient, step.shape),
        sum_to_shape(shift_gradient, shift.shape),
        v_gradient.astype(v.dtype),
        None,
    )


quantize.defvjp(_quantize_forward, _quantize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantize_to_levels(spec: QuantizeSpec, levels: jax.Array, v: jax.Array, context: Context) -> jax.Array:
    """Quantizes to the nearest of arbitrary ascending levels.

    The integer domain is the position among the levels: a value a quarter of the way from level 2 to level 3 is at
    2.25. Rounding thus gives the nearest level, and every estimator applies. With the position p = j + w and levels l:

        dy/dv   = R'(p) between the bounds, else 0 (or as `spec` and the estimator say)
        dy/dl_k = [k = code] - R' · ((1 - w) · [k = j] + w · [k = j+1]) between the bounds, else [k = code]

    For levels k·step this gives LSQ's gradient of the step, for levels that are sums of steps nuLSQ's. For the levels,
    R' is 1 if the estimator has a `straight_step`.

    Args:
        spec: estimator and bounds, 0 and len(levels) - 1.
        levels: float32 (levels,), ascending.
        v: floating-point array.
        context: progress, random key and strength.

    Returns:
        y in the shape and dtype of v; the arithmetic is float32.
    """
    codes = spec.codes(_position(levels, v)[2], context)
    if spec.estimator.rounds_in_training or context.key is None:
        return levels[codes.astype(jnp.int32)].astype(v.dtype)
    below, fraction = _split(codes, levels.size)
    return (levels[below] * (1 - fraction) + levels[below + 1] * fraction).astype(v.dtype)


def nearest_levels(spec: QuantizeSpec, levels: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the indices of the levels that `quantize_to_levels` returns in evaluation, int32."""
    return spec.codes(_position(levels, v)[2], EVALUATION).astype(jnp.int32)


def _position(levels: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (j, w, p): v is at fraction w between levels j and j + 1, or beyond the outermost levels; p = j + w."""
    v = v.astype(jnp.float32)
    below = jnp.searchsorted(levels[1:-1], v, side='right').astype(jnp.int32)
    start, end = levels[below], levels[below + 1]
    fraction = (v - start) / (end - start)
    return below, fraction, below.astype(jnp.float32) + fraction


def _split(position: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the integer and the fractional part of a position; with additive noise it is not an integer."""
    below = jnp.clip(jnp.floor(position), 0, count - 2)
    return below.astype(jnp.int32), position - below


def _levels_forward(spec, levels, v, context):
    return quantize_to_levels(spec, levels, v, context), (levels, v, context)


def _levels_backward(spec, residuals, cotangent):
    levels, v, context = residuals
    cotangent = cotangent.astype(jnp.float32)
    below, fraction, position = _position(levels, v)
    _, inside, _, gradient, _, v_gradient = spec.backward(cotangent, position, context)
    inner = jnp.where(inside, cotangent if spec.estimator.straight_step else gradient, 0.0)
    code, code_fraction = _split(spec.codes(position, context), levels.size)
    shares = (
        (code, cotangent * (1 - code_fraction)),
        (code + 1, cotangent * code_fraction),
        (below, -inner * jnp.where(inside, 1 - fraction, 0.0)),
        (below + 1, -inner * jnp.where(inside, fraction, 0.0)),
    )
    levels_gradient = jnp.zeros_like(levels)
    for index, share in shares:
        levels_gradient = levels_gradient.at[index.reshape(-1)].add(share.reshape(-1))
    return levels_gradient, v_gradient.astype(v.dtype), None


quantize_to_levels.defvjp(_levels_forward, _levels_backward)


def round_with_estimator(
    estimator: Estimator, value: jax.Array, context: Context = EVALUATION, *, lower: int, upper: int
) -> jax.Array:
    """Returns clip(round(value), lower, upper) with the estimator's gradient: `quantize` with a fixed step of 1.

    Args:
        estimator: the backward rule.
        value: floating-point array of any shape, in the integer domain.
        context: progress, random key and strength.
        lower: the smallest code.
        upper: the largest code.
    """
    return quantize(QuantizeSpec(estimator, lower, upper), jnp.float32(1), jnp.float32(0), value, context)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scale_gradient(factor: float, x: jax.Array) -> jax.Array:
    """Returns x; its gradient is multiplied by `factor`."""
    del factor
    return x


scale_gradient.defvjp(lambda factor, x: (x, None), lambda factor, _, cotangent: (cotangent * factor,))


def sum_to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns x summed to `shape`, which is () or has the axes of x, some of size 1."""
    if shape == ():
        return jnp.sum(x)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True)
