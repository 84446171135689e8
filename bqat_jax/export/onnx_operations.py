"""ONNX rules for elementwise JAX operations.

A rule is a function `rule(graph, equation, operands) -> results`. It reads shapes from the equation; an operand may
have ones in place of larger sizes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_values import Constant, Tensor, Value, broadcast_shape

Rule = Callable[[Graph, Any, list[Value]], Sequence[Value]]
# onnxruntime supports few integer dtypes: others are computed in these and cast back, which wraps around like JAX.
_WIDER = {'bool': 'int32', 'int8': 'int32', 'uint8': 'int32', 'int16': 'int32', 'uint16': 'int32', 'uint32': 'int64'}


def refuse(graph: Graph, equation: Any, what: str) -> ValueError:
    """Returns the error for an operation without a rule.

    Args:
        graph: the graph under construction.
        equation: the operation.
        what: the variant that has no rule; '' for all.
    """
    return ValueError(
        f'ONNX export has no rule for the operation {equation.primitive.name!r}{what and f" {what}"}{graph.place}. '
        'Export to StableHLO instead, or write this part of the network with other operations.'
    )


def emit(graph: Graph, operation: str, operands: Sequence[Value], dtype: Any = None) -> Tensor:
    """Adds an elementwise ONNX operator and returns its output.

    Args:
        graph: the graph under construction.
        operation: the ONNX operator.
        operands: operands, which are broadcast.
        dtype: dtype of the result; by default that of the last operand.
    """
    shape = broadcast_shape(*(value.shape for value in operands))
    return graph.add(operation, operands, shape, operands[-1].dtype if dtype is None else dtype)


def scalar(number: Any, like: Value) -> Constant:
    """Returns a constant with the dtype of `like`."""
    return Constant(np.array(number, like.dtype))


def full(graph: Graph, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Returns an equation's operands in their full shapes."""
    return [graph.expand(value, x.aval.shape) for value, x in zip(operands, equation.invars, strict=True)]


def widen(graph: Graph, operands: Sequence[Value]) -> list[Value]:
    """Returns operands in dtypes that onnxruntime supports."""
    return [graph.cast(value, _WIDER.get(value.dtype.name, value.dtype)) for value in operands]


def _direct(operation: str) -> Rule:
    """A single ONNX operator, computed in the wider dtype."""

    def rule(graph, equation, operands):
        return [graph.cast(emit(graph, operation, widen(graph, operands)), operands[0].dtype)]

    return rule


def _comparison(operation: str, negated: bool = False) -> Rule:
    def rule(graph, equation, operands):
        result = emit(graph, operation, widen(graph, operands), bool)
        return [emit(graph, 'Not', [result]) if negated else result]

    return rule


def _neutral(operation: str, number: float, on_left: bool) -> Rule:
    """An operation that is omitted if one operand is its neutral element."""
    direct = _direct(operation)

    def rule(graph, equation, operands):
        for own, other in ((1, 0), (0, 1))[: 2 if on_left else 1]:
            value = operands[own]
            is_neutral = isinstance(value, Constant) and not value.codes and bool(np.all(value.array == number))
            if is_neutral and len(operands[other].shape) == len(equation.outvars[0].aval.shape):
                return [operands[other]]
        return direct(graph, equation, operands)

    return rule


def _bits(on_bool: str, on_integers: str) -> Rule:
    def rule(graph, equation, operands):
        return [emit(graph, on_bool if operands[0].dtype == bool else on_integers, operands)]

    return rule


def _shift(direction: str) -> Rule:
    def rule(graph, equation, operands):
        value, by = operands
        bits = 8 * value.dtype.itemsize
        if not isinstance(by, Constant) or np.any(by.array < 0) or np.any(by.array >= bits):
            raise refuse(graph, equation, 'by a number of bits that is not constant')
        unsigned = f'uint{bits}'
        shifted = [graph.cast(value, unsigned), Constant(by.array.astype(unsigned))]
        shape = broadcast_shape(value.shape, by.shape)
        result = graph.add('BitShift', shifted, shape, unsigned, direction=direction)
        return [graph.cast(result, value.dtype)]

    return rule


def _round(graph, equation, operands):
    (x,) = operands
    if equation.params['rounding_method'] == 1:  # half to even
        return [emit(graph, 'Round', [x])]
    size = emit(graph, 'Abs', [x])
    whole = emit(graph, 'Floor', [size])
    is_up = emit(graph, 'GreaterOrEqual', [emit(graph, 'Sub', [size, whole]), scalar(0.5, x)], bool)
    rounded = emit(graph, 'Add', [whole, graph.cast(is_up, x.dtype)])
    return [emit(graph, 'Mul', [emit(graph, 'Sign', [x]), rounded])]


def _clamp(graph, equation, operands):
    lower, x, upper = widen(graph, operands)
    result = emit(graph, 'Min', [emit(graph, 'Max', [x, lower]), upper])
    return [graph.cast(result, operands[1].dtype)]


def _rsqrt(graph, equation, operands):
    return [emit(graph, 'Div', [scalar(1, operands[0]), emit(graph, 'Sqrt', operands)])]


def _cbrt(graph, equation, operands):
    root = emit(graph, 'Pow', [emit(graph, 'Abs', operands), scalar(1 / 3, operands[0])])
    return [emit(graph, 'Mul', [emit(graph, 'Sign', operands), root])]


def _square(graph, equation, operands):
    (x,) = widen(graph, operands)
    return [graph.cast(emit(graph, 'Mul', [x, x]), operands[0].dtype)]


def _integer_pow(graph, equation, operands):
    """Multiplies in JAX's order."""
    (x,), exponent = widen(graph, operands), equation.params['y']
    if exponent == 0:
        return [graph.reshape(scalar(1, operands[0]), (1,) * len(x.shape))]
    factors, left = [], abs(exponent)
    while left:
        factors += [x] if left % 2 else []
        left //= 2
        x = emit(graph, 'Mul', [x, x]) if left else x
    result = factors[0]
    for factor in factors[1:]:
        result = emit(graph, 'Mul', [result, factor])
    if exponent < 0:
        result = emit(graph, 'Div', [scalar(1, x), result])
    return [graph.cast(result, operands[0].dtype)]


def _pow(graph, equation, operands):
    return [emit(graph, 'Pow', operands, operands[0].dtype)]


def _exp2(graph, equation, operands):
    return [emit(graph, 'Pow', [scalar(2, operands[0]), *operands])]


def _log1p(graph, equation, operands):
    """log(u)·x/(u-1) with u = 1 + x, which is accurate for small x; x if u = 1, log(u) if u is infinite."""
    (x,) = operands
    u = emit(graph, 'Add', [x, scalar(1, x)])
    log, less = emit(graph, 'Log', [u]), emit(graph, 'Sub', [u, scalar(1, x)])
    near = emit(graph, 'Mul', [log, emit(graph, 'Div', [x, less])])
    is_infinite = graph.add('IsInf', [u], u.shape, bool)
    near = emit(graph, 'Where', [is_infinite, log, near])
    return [emit(graph, 'Where', [emit(graph, 'Equal', [u, scalar(1, x)], bool), x, near])]


def _expm1(graph, equation, operands):
    """tanh(x/2)·(exp(x) + 1), which is accurate for small x."""
    (x,) = operands
    tanh = emit(graph, 'Tanh', [emit(graph, 'Mul', [x, scalar(0.5, x)])])
    return [emit(graph, 'Mul', [tanh, emit(graph, 'Add', [emit(graph, 'Exp', [x]), scalar(1, x)])])]


def _erfc(graph, equation, operands):
    return [emit(graph, 'Sub', [scalar(1, operands[0]), emit(graph, 'Erf', operands)])]


def _is_finite(graph, equation, operands):
    (x,) = operands
    parts = [graph.add(operation, [x], x.shape, bool) for operation in ('IsInf', 'IsNaN')]
    return [emit(graph, 'Not', [emit(graph, 'Or', parts)])]


def _rem(graph, equation, operands):
    x = widen(graph, operands)
    shape = broadcast_shape(*(value.shape for value in x))
    return [graph.cast(graph.add('Mod', x, shape, x[0].dtype, fmod=1), operands[0].dtype)]


def _select(graph, equation, operands):
    which, first, *others = operands
    (result,), dtype = widen(graph, [first]), first.dtype
    for number, other in enumerate(others, 1):
        (case,) = widen(graph, [other])
        is_it = which if which.dtype == bool else emit(graph, 'Equal', [which, scalar(number, which)], bool)
        result = emit(graph, 'Where', [is_it, case, result])
    return [graph.cast(result, dtype)]


def _convert(graph, equation, operands):
    return [graph.cast(operands[0], equation.params['new_dtype'])]


def _reduce_precision(graph, equation, operands):
    (x,), bits = operands, (equation.params['exponent_bits'], equation.params['mantissa_bits'])
    if bits[0] >= 8 and bits[1] >= 23:
        return [x]
    kinds = {(8, 7): jnp.bfloat16, (5, 10): np.float16}
    if bits not in kinds:
        raise refuse(graph, equation, f'to {bits[0]} bits of exponent and {bits[1]} of mantissa')
    return [graph.cast(graph.cast(x, kinds[bits]), x.dtype)]


# Elementwise operations: operands broadcast, and constants are folded in their own shapes.
RULES: dict[str, Rule] = {
    'add': _neutral('Add', 0, True),
    'add_any': _neutral('Add', 0, True),
    'sub': _neutral('Sub', 0, False),
    'mul': _neutral('Mul', 1, True),
    'div': _neutral('Div', 1, False),
    'max': _neutral('Max', -np.inf, True),
    'min': _neutral('Min', np.inf, True),
    'rem': _rem,
    'neg': _direct('Neg'),
    'sign': _direct('Sign'),
    'abs': _direct('Abs'),
    'floor': _direct('Floor'),
    'ceil': _direct('Ceil'),
    'round': _round,
    'clamp': _clamp,
    'sqrt': _direct('Sqrt'),
    'rsqrt': _rsqrt,
    'cbrt': _cbrt,
    'square': _square,
    'integer_pow': _integer_pow,
    'pow': _pow,
    'exp': _direct('Exp'),
    'exp2': _exp2,
    'expm1': _expm1,
    'log': _direct('Log'),
    'log1p': _log1p,
    'logistic': _direct('Sigmoid'),
    'erf': _direct('Erf'),
    'erfc': _erfc,
    **{name: _direct(name.title()) for name in ('sin', 'cos', 'tan', 'sinh', 'cosh', 'tanh')},
    **{name: _direct(name.title()) for name in ('asin', 'acos', 'atan', 'asinh', 'acosh', 'atanh')},
    'is_finite': _is_finite,
    'eq': _comparison('Equal'),
    'ne': _comparison('Equal', negated=True),
    'lt': _comparison('Less'),
    'le': _comparison('LessOrEqual'),
    'gt': _comparison('Greater'),
    'ge': _comparison('GreaterOrEqual'),
    'and': _bits('And', 'BitwiseAnd'),
    'or': _bits('Or', 'BitwiseOr'),
    'xor': _bits('Xor', 'BitwiseXor'),
    'not': _bits('Not', 'BitwiseNot'),
    'shift_left': _shift('LEFT'),
    'shift_right_logical': _shift('RIGHT'),
    'select_n': _select,
    'convert_element_type': _convert,
    'reduce_precision': _reduce_precision,
}
