"""Quantizers that ONNX export writes as QuantizeLinear, Clip and DequantizeLinear (QCDQ), as Brevitas does.

In a traced program they are calls of functions with fixed names, which the export recognises. Elsewhere they are plain
arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

QUANTIZE_INPUT = 'bqat_jax_quantize_input'
DEQUANTIZE_WEIGHTS = 'bqat_jax_dequantize_weights'


def quantize_input(x: jax.Array, step: jax.Array, lower: int, upper: int, label: str = '') -> jax.Array:
    """Returns clip(round(x/step), lower, upper)·step.

    In ONNX the step must be a constant of the model; otherwise this is exported as plain arithmetic.

    Args:
        x: float32.
        step: float32 ().
        lower: the smallest code, 0 or less.
        upper: the largest code, above 0.
        label: name of the codes, as for `checkpoint_name`; if the export observes it, they are a further output of the
            model, int32.

    Raises:
        ValueError: if the codes do not fit 8 bits.
    """
    check_bounds(lower, upper)
    return _quantize_input(x, step, np.float32(lower), np.float32(upper), label)


def dequantize_weights(codes: jax.Array, scale: jax.Array, lower: int, upper: int) -> jax.Array:
    """Returns codes·scale, float32.

    In ONNX codes and scale must be constants of the model; otherwise this is exported as plain arithmetic.

    Args:
        codes: integers of any dtype.
        scale: float32, of the rank of `codes` or ().
        lower: the smallest possible code, 0 or less.
        upper: the largest possible code, above 0.

    Raises:
        ValueError: if the codes do not fit 8 bits.
    """
    check_bounds(lower, upper)
    return _dequantize_weights(codes, scale, np.float32(lower), np.float32(upper))


def check_bounds(lower: int, upper: int) -> None:
    """Checks that codes fit int8 or, if `lower` is 0, uint8.

    Raises:
        ValueError: if they do not.
    """
    least, most = (-128, 127) if lower < 0 else (0, 255)
    if not least <= lower <= 0 < upper <= most:
        raise ValueError(f'codes from {lower} to {upper}: must lie in -128 to 127 or 0 to 255 and include 0 and 1.')


def _named(name: str):
    """Returns a decorator that renames a function, and with it the compiled program, to `name`."""

    def rename(function):
        function.__name__ = function.__qualname__ = name
        return function

    return rename


@functools.partial(jax.jit, static_argnames=('label',))
@_named(QUANTIZE_INPUT)
def _quantize_input(x, step, lower, upper, label):
    codes = jnp.clip(jnp.round(x / step), lower, upper)
    return (checkpoint_name(codes, label) if label else codes) * step


@jax.jit
@_named(DEQUANTIZE_WEIGHTS)
def _dequantize_weights(codes, scale, lower, upper):
    del lower, upper  # read by the export
    return codes.astype(jnp.float32) * scale
